"""What all kernels share: choosing a backend, and checking arguments with errors that name the expected shape.

Every primitive has up to three implementations of one definition:

``reference``  a plain loop, the definition itself, for any dtype
``parallel``   vectorised PyTorch, what a CPU uses
``triton``     GPU kernels, forward and backward

``backend="auto"`` picks the fastest one that can run. `use` overrides that choice for a block of code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "parallel", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)

# Plain module values, read once: torch.compile traces through them without a graph break.
_settings = {
    "backend": os.environ.get("SEQARCH_BACKEND", "auto"),
    "debug": os.environ.get("SEQARCH_DEBUG") == "1",
}
_triton_installed = importlib.util.find_spec("triton") is not None
# Without a GPU, Triton's interpreter runs the kernels on CPU tensors: slow, but the same code. Triton reads this variable
# when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
_triton_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def use(backend: str = "auto", *, debug: bool = False) -> Iterator[None]:
    """Override ``backend="auto"`` inside a ``with`` block; ``debug=True`` also checks every input for NaN.

    The environment variables ``SEQARCH_BACKEND`` and ``SEQARCH_DEBUG=1``, set before Python starts, do the same for a
    whole process.
    """
    _check_backend(backend)
    before = dict(_settings)
    _settings.update(backend=backend, debug=debug)
    try:
        yield
    finally:
        _settings.update(before)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")


def _why_not_triton(tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return the reason why the Triton kernel cannot take these tensors, or None when it can."""
    if not _triton_installed:
        return "the package triton is not installed (pip install triton, Linux only)"
    wrong = [t.dtype for t in tensors if t.dtype not in dtypes]
    if wrong:
        return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {wrong[0]}"
    if all(t.is_cuda for t in tensors):
        if torch.cuda.get_device_capability(tensors[0].device) < (7, 5):
            return "it needs an NVIDIA GPU of compute capability 7.5 or newer"
        return None
    if _triton_interpreted:
        return None
    return "the tensors are on the CPU: move them to the GPU, or set TRITON_INTERPRET=1 before Python starts"


def choose(
    backend: str,
    *tensors: Tensor,
    dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES,
    limit: str | None = None,
    turing: Callable[[], bool] | None = None,
) -> str:
    """Return the implementation to run: ``"reference"``, ``"parallel"`` or ``"triton"``.

    Args:
        backend: what the caller asked for; ``"auto"`` first looks at `use` and at ``SEQARCH_BACKEND``.
        tensors: the inputs; their device and dtype decide.
        dtypes: the dtypes that the primitive's Triton kernel takes.
        limit: why the Triton kernel cannot take these *sizes* (None: it can).
        turing: a self-test that decides whether Triton is used on compute capability 7.5 (a T4); run once by
            the caller's cache. None: never there, use ``"parallel"``.

    Raises:
        ValueError: unknown backend, or an explicit ``"triton"`` that cannot run, with the reason.
    """
    _check_backend(backend)
    if backend == "auto":
        backend = _settings["backend"]
        _check_backend(backend)
    if backend in ("reference", "parallel"):
        return backend
    reason = limit or _why_not_triton(tensors, dtypes)
    if backend == "triton":
        if reason:
            raise ValueError(f'backend="triton" cannot run here: {reason}')
        return "triton"
    if reason or not tensors[0].is_cuda:
        return "parallel"
    if torch.cuda.get_device_capability(tensors[0].device) >= (8, 0):
        return "triton"
    return "triton" if turing is not None and turing() else "parallel"


def automatic(backend: str) -> bool:
    """Whether nobody has asked for a backend: neither the caller, nor `use`, nor ``SEQARCH_BACKEND``."""
    return backend == "auto" and _settings["backend"] == "auto"


def default_dtype() -> torch.dtype:
    """Return the training dtype that suits the machine: bfloat16 from Ampere on, float16 on a T4, else float32."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which states and sums are kept: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_shape(name: str, tensor: Tensor, shape: str, sizes: dict[str, int]) -> None:
    """Raise ValueError unless `tensor` has the named `shape`, such as ``"B T D"``.

    A letter seen for the first time is bound to its size in `sizes`; afterwards it must match. A digit stands
    for itself.
    """
    letters = shape.split()
    if not isinstance(tensor, Tensor):
        raise ValueError(f"expected {name} to be a tensor of shape ({', '.join(letters)}), got {type(tensor).__name__}")
    known = ", ".join(f"{s} = {sizes[s]}" for s in dict.fromkeys(letters) if s in sizes)
    fits, bound = tensor.ndim == len(letters), dict(sizes)
    for letter, size in zip(letters, tensor.shape, strict=False):
        wanted = int(letter) if letter.isdigit() else bound.setdefault(letter, size)
        fits = fits and wanted == size
    if not fits:
        raise ValueError(
            f"expected {name} of shape ({', '.join(letters)}){' with ' + known if known else ''}, got {tuple(tensor.shape)}"
        )
    sizes.update(bound)


def check_same(reference: tuple[str, Tensor], *others: tuple[str, Tensor], dtype: bool = True) -> None:
    """Raise ValueError unless all named tensors share the first one's device, and its dtype if `dtype`."""
    name, first = reference
    if not (first.is_floating_point() or first.is_complex()):
        raise ValueError(f"expected {name} to be of a floating-point or complex dtype, got {first.dtype}")
    for other_name, other in others:
        if other.device != first.device:
            raise ValueError(f"expected {other_name} on {first.device} like {name}, got {other.device}")
        if dtype and other.dtype != first.dtype:
            raise ValueError(f"expected {other_name} of dtype {first.dtype} like {name}, got {other.dtype}")


def debugging() -> bool:
    """Whether `use(debug=True)` is in force: values may be looked at, whatever it costs."""
    return _settings["debug"]


def check_values(**tensors: Tensor | None) -> None:
    """Under `use(debug=True)`, raise ValueError when an input holds NaN. Without it, cost nothing: no sync."""
    if not debugging():
        return
    for name, tensor in tensors.items():
        if tensor is not None and torch.isnan(tensor).any():
            raise ValueError(f"expected {name} without NaN, got {int(torch.isnan(tensor).sum())} NaN values")
