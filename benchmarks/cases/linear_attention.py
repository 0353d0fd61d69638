"""Linear attention against the T x T table and the chunked kernels of flash-linear-attention."""

import functools

import torch

from seqarch.kernels.linear_attention import cost, linear_attention

from ..case import ABSENT, Case, Run, first, installed, ours

MOST_TABLE = 2**26  # entries of the table of weights, beyond which it is not built


def case(B: int, H: int, T: int, D: int, E: int, kind: str = "plain") -> Case:
    """`kind`: "plain"; "decay", one per token; "gated", one per feature; "taylor", normalised Taylor features of q and k."""

    def make(device, dtype):
        def normal(*shape):
            return torch.randn(*shape, device=device, dtype=dtype)

        q, k = normal(B, H, T, D) * D**-0.5, normal(B, H, T, D) * D**-0.5
        rates = {"decay": (B, H, T), "gated": (B, H, T, D)}.get(kind)
        return [q, k, normal(B, H, T, E), *([-torch.rand(*rates, device=device) / 16] if rates else [])]

    def attend(q, k, v, log_decay=None, *, backend):
        options = {"features": "taylor", "normalize": True} if kind == "taylor" else {}
        return linear_attention(q, k, v, log_decay=log_decay, backend=backend, **options)

    def table(q, k, v):
        return (q @ k.mT).tril() @ v

    def chunked(q, k, v, g=None):
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla

        q, k, v, *g = (x.transpose(1, 2) for x in (q, k, v, *([] if g is None else [g])))
        if kind == "plain":
            o = first(chunk_linear_attn(q, k, v, scale=1.0, normalize=False))
        else:
            o = first((chunk_gla if kind == "gated" else chunk_simple_gla)(q, k, v, *g, scale=1.0))
        return o.transpose(1, 2)

    peers: dict[str, Run | str] = {}
    if kind == "plain" and B * H * T * T <= MOST_TABLE:
        peers["table T x T"] = table
    if kind != "taylor":
        peers["fla"] = chunked if installed("fla") else ABSENT
    shape, F = dict(B=B, H=H, T=T, D=D, E=E), 1 + D + D * D if kind == "taylor" else D
    return Case(
        f"linear_attention, {kind}", shape, make, ours(attend), cost.bytes,
        lambda B, H, T, D, E, backward=False: cost.flops(B, H, T, F, E, backward), peers,
    )  # fmt: skip


CASES = {
    "cpu": [case(1, 4, 4096, 64, 64, kind) for kind in ("plain", "decay", "gated")]
    + [case(1, 4, 4096, 16, 64, "taylor"), case(1, 1, 65536, 64, 64)],
    "cuda": [case(8, 16, 4096, 256, 64), case(8, 16, 4096, 16, 64, "taylor"), case(1, 16, 65536, 128, 128)]
    + [case(8, 16, 4096, 128, 64, kind) for kind in ("decay", "gated")],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""

    def decay(*shape):
        return (-x(*shape, dtype=torch.float32).detach().abs()).requires_grad_()

    def faded(q, k, v, log_decay, **options):
        return linear_attention(q, k, v, log_decay=log_decay, **options)

    for D, E in ((8, 8), (64, 64), (150, 100)):
        for rates in (None, decay(1, 2, 100), decay(1, 2, 100, D)):
            run = functools.partial(faded, normalize=rates is None)
            yield run, (x(1, 2, 100, D), x(1, 2, 100, D), x(1, 2, 100, E), rates)
    for features, D, F in (("elu", 64, 64), ("taylor", 16, 273)):
        for rates in (None, decay(1, 2, 100), decay(1, 2, 100, F)):
            run = functools.partial(faded, features=features, normalize=True)
            yield run, (x(1, 2, 100, D), x(1, 2, 100, D), x(1, 2, 100, 64), rates)
