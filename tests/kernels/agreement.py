"""How two implementations of a kernel are compared: outputs, states and gradients, with the book's tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELATIVE = {  # (outputs, gradients)
    torch.float64: (1e-10, 1e-10),
    torch.complex128: (1e-10, 1e-10),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (1e-2, 2e-2),
}


def error(x: Tensor, reference: Tensor) -> float:
    """max|x - ref| / (max|ref| + 1e-6), in double precision; infinite when x is not finite."""
    wide = torch.complex128 if reference.is_complex() else torch.float64
    x, reference = x.detach().to(wide), reference.detach().to(wide)
    if x.shape != reference.shape:
        raise AssertionError(f"shape {tuple(x.shape)} against the reference's {tuple(reference.shape)}")
    if x.numel() == 0:
        return 0.0
    if not torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all():
        return float("inf")
    return ((x - reference).abs().max() / (reference.abs().max() + 1e-6)).item()


def tolerance(dtype: torch.dtype, steps: int, matmul: bool = False) -> tuple[float, float]:
    """(outputs, gradients). Rounding of a float32 scan grows with the root of its length."""
    if dtype in RELATIVE:
        return RELATIVE[dtype]
    out = 1e-5 if matmul else min(max(2e-6 * steps**0.5, 1e-6), 1e-4)
    return out, out


def outputs_and_gradients(
    run: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    seed: int = 0,
    dtypes: Sequence[torch.dtype] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run on fresh leaves and take gradients of a random linear functional of *all* outputs (states included).

    The gradient that arrives at an output is rounded to `dtypes`, by default that of the output: a reference in double
    precision is given the same numbers as the implementation it judges.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [o for o in run(*leaves) if o is not None]
    generator = torch.Generator().manual_seed(seed)
    loss = 0.0
    for o, dtype in zip(outputs, dtypes or [o.dtype for o in outputs], strict=True):
        weight = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)
        weight = weight if dtype.is_complex else weight.to(dtype).double()
        loss = loss + (
            (o.real * weight).sum() + (o.imag * weight.flip(0)).sum() if o.is_complex() else (o * weight).sum()
        )
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def assert_agree(
    run: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    steps: int,
    names: Sequence[str],
    loose: Sequence[str] = (),
    matmul: bool = False,
) -> None:
    """Assert that `run` gives the outputs and gradients of `reference`.

    Args:
        run, reference: functions of the inputs that return a sequence of tensors.
        inputs: the tensors; the reference gets them in double precision, rounded as they are.
        steps: the length of the recurrence, for the tolerance.
        names: names of the inputs, for messages and `loose`.
        loose: inputs such as decays whose gradients may be three times as far off.
        matmul: whether the outputs come out of matrix products.
    """
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs]
    got, got_gradients = outputs_and_gradients(run, inputs)
    want, want_gradients = outputs_and_gradients(reference, wide, dtypes=[o.dtype for o in got])
    dtype = inputs[0].dtype
    for_outputs, for_gradients = tolerance(dtype, steps, matmul)
    assert len(got) == len(want)
    for i, (x, ref) in enumerate(zip(got, want, strict=True)):
        assert error(x, ref) <= for_outputs, f"output {i}: error {error(x, ref):.1e} > {for_outputs:.1e}"
    for name, x, ref in zip(names, got_gradients, want_gradients, strict=True):
        limit = for_gradients * (3 if name in loose else 1)
        assert error(x, ref) <= limit, f"gradient of {name}: error {error(x, ref):.1e} > {limit:.1e}"
        if dtype in (torch.float16, torch.bfloat16) and ref.norm() > 1e-3:
            cosine = torch.nn.functional.cosine_similarity(x.double().flatten(), ref.flatten(), dim=0)
            assert cosine > 0.9999, f"gradient of {name}: cosine {cosine:.6f}"


def assert_memory_is_linear(
    run: Callable[..., Sequence[Tensor]],
    make: Callable[[int], Sequence[Tensor]],
    lengths: tuple[int, int, int] = (1024, 2048, 4096),
) -> None:
    """Assert that the peak of a forward and backward pass on a CPU grows by the same amount for every further step."""
    peaks = []
    for T in lengths:
        inputs = [x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()) for x in make(T)]
        leaves = [x for x in inputs if x.requires_grad]

        def both(inputs=inputs, leaves=leaves):
            outputs = [o for o in run(*inputs) if o is not None and o.requires_grad]
            sums = [(torch.view_as_real(o) if o.is_complex() else o).sum() for o in outputs]
            torch.autograd.grad(sums, leaves, allow_unused=True)

        both()  # tables and caches are built before the count starts
        peaks.append(peak_bytes(both))
    slopes = [(peaks[i + 1] - peaks[i]) / (lengths[i + 1] - lengths[i]) for i in (0, 1)]
    assert slopes[1] <= 1.1 * slopes[0], f"peaks {peaks} at lengths {lengths}: more than linear"
