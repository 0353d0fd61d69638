"""linear_attention: one definition, three implementations, checked against a float64 loop and against masked products."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.linear_attention import (
    cost,
    elu_features,
    linear_attention,
    linear_attention_state,
    linear_attention_step,
    taylor_features,
)

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("q", "k", "v", "S0", "log_decay")
LOOSE = ("log_decay",)
WIDTHS = {"none": 0, "token": 1, "feature": 2}
MAPS = {None: lambda x: x, "elu": elu_features, "taylor": taylor_features}


def width(features, D):
    return 1 + D + D * D if features == "taylor" else D


def rates(shape, kind, g):
    """Log decays that are hard in their own way."""
    x = torch.rand(shape, generator=g, dtype=torch.float64)
    return {
        "mild": -x / 8,
        "strong": -20 * x,
        "keep": torch.zeros_like(x),
        "resets": torch.where(x < 0.3, -320.0, -x / 50),  # between two resets hardly anything is forgotten
        "nothing": torch.full_like(x, -torch.inf),
    }[kind]


def inputs(
    B, H, T, D, E, dtype=torch.float32, features=None, normalize=False, decay="none", kind="mild", seed=0, state=True
):
    """Random q, k, v, S0 and log_decay. The state is that of a prompt, so that its sums of weights are positive."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = normal(B, H, T, D), normal(B, H, T, D), normal(B, H, T, E)
    prompt_k, prompt_v = normal(B, H, 3, D), normal(B, H, 3, E)
    if normalize and features is None:
        q, k, prompt_k = q.abs(), k.abs(), prompt_k.abs()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = [x.to(dtype) for x in (q, k, v)]
    if state:
        found.append(linear_attention_state(prompt_k, prompt_v, features=features, normalize=normalize).to(wide))
    if decay != "none":
        shape = (B, H, T) if decay == "token" else (B, H, T, width(features, D))
        found.append(rates(shape, kind, g).to(wide))
    return [x.to(DEVICE) for x in found]


def runner(backend, state=True, **options):
    """Take (q, k, v), (q, k, v, S0), (q, k, v, log_decay) or all five."""

    def run(q, k, v, *rest):
        S0, *rest = rest if state else (None, *rest)
        return linear_attention(q, k, v, S0, log_decay=rest[0] if rest else None, backend=backend, **options)

    return run


def agree(backends, tensors, state=True, **options):
    names = [n for n in NAMES if state or n != "S0"][: len(tensors)]
    for backend in backends:
        assert_agree(
            runner(backend, state, **options), runner("reference", state, **options), tensors,
            steps=tensors[0].shape[2], names=names, loose=LOOSE, matmul=True,
        )  # fmt: skip


shapes = dict(
    rows=st.sampled_from([(1, 1), (1, 1), (1, 1), (1, 1), (2, 1), (1, 2)]),  # (B, H)
    T=st.one_of(st.integers(1, 20), st.sampled_from([1, 2, 31, 32, 33])),
    D=st.sampled_from([1, 2, 3]),
    E=st.sampled_from([1, 3, 17]),
    features=st.sampled_from([None, "elu", "taylor"]),
    normalize=st.booleans(),
    decay=st.sampled_from(["none", "token", "feature"]),
    kind=st.sampled_from(["mild", "strong", "keep", "resets", "nothing"]),
    state=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, rows, D, features, normalize, kind, state, **case):
    if normalize:  # where one value is all that is averaged, the gradients of weights are 0 and errors have no measure
        state, D, kind = True, max(D, 2), kind if kind == "keep" else "mild"
    tensors = inputs(
        *rows, D=D, dtype=dtype, features=features, normalize=normalize, kind=kind, state=state, **case
    )  # fmt: skip
    agree(backends, tensors, state, features=features, normalize=normalize)


@settings(max_examples=60)
@given(**shapes)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**shapes)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    if case["normalize"]:  # an average, and its gradient, of a few numbers may cancel down to their rounding
        case |= {"D": 5, "E": 17, "T": max(case["T"], 8)}
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=80)
@given(**shapes)
def test_the_chunked_form_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@pytest.mark.parametrize("decay", ["none", "token"])
def test_the_273_features_of_width_16(decay):
    """Features in five tiles of 64, the last one ragged."""
    tensors = inputs(1, 1, 40, 16, 8, features="taylor", normalize=True, decay=decay)
    agree(["parallel", "triton"], tensors, features="taylor", normalize=True)


@pytest.mark.parametrize("decay", ["none", "token", "feature"])
@pytest.mark.parametrize("normalize", [False, True])
def test_more_features_and_columns_than_one_tile(decay, normalize):
    tensors = inputs(1, 1, 20, 73, 70, normalize=normalize, decay=decay)
    agree(["parallel", "triton"], tensors, normalize=normalize)


@pytest.mark.parametrize("decay", ["none", "token", "feature"])
def test_several_segments(decay):
    """More tokens than the chunked form treats at one time."""
    agree(["parallel"], inputs(1, 1, 1100, 3, 2, torch.float64, decay=decay))


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("decay", ["none", "token", "feature"])
@pytest.mark.parametrize("features, normalize", [(None, False), ("elu", True), ("taylor", True)])
def test_gradcheck(backend, decay, features, normalize):
    tensors = inputs(1, 2, 7, 2, 2, torch.float64, features, normalize, decay)
    run = runner(backend, features=features, normalize=normalize)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in tensors])


@ALL
@pytest.mark.parametrize("T", [1, 31, 64, 65])
@pytest.mark.parametrize("features", [None, "elu", "taylor"])
def test_is_a_masked_product(backend, T, features):
    """Weights phi(q_i) phi(k_j) in a T x T table, the future masked."""
    q, k, v = inputs(1, 2, T, 4, 3, features=features, state=False)
    x = MAPS[features](q.double()), MAPS[features](k.double())
    table = (x[0] @ x[1].mT).tril()
    o, S = linear_attention(q, k, v, features=features, backend=backend)
    assert error(o, table @ v.double()) < 1e-5 and error(S, x[1].mT @ v.double()) < 1e-5
    if features:
        o, _ = linear_attention(q, k, v, features=features, normalize=True, backend=backend)
        assert error(o, (table / table.sum(-1, keepdim=True)) @ v.double()) < 1e-5


def test_taylor_features_expand_the_exponential():
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)
    s = q @ k.T / 4
    torch.testing.assert_close(taylor_features(q) @ taylor_features(k).T, 1 + s + s * s / 2, rtol=0, atol=1e-12)
    assert taylor_features(q).shape == (50, 273)
    assert torch.equal(taylor_features(torch.zeros(1, 3))[0], torch.eye(13)[0])
    assert (elu_features(10 * q) > 0).all()


@ALL
class TestPrefix:
    """The state of a prompt read without order is the initial state of the causal part."""

    def test_is_the_sum_of_a_causal_and_a_full_part(self, backend):
        q, k, v = inputs(1, 2, 40, 3, 4, features="taylor", state=False)
        _, ke, ve = inputs(1, 2, 25, 3, 4, state=False, seed=1)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, ke, ve)]
        S0 = linear_attention_state(leaves[3], leaves[4], features="taylor", normalize=True)
        o, S = linear_attention(*leaves[:3], S0, features="taylor", normalize=True, backend=backend)
        wide = [x.double().requires_grad_() for x in (q, k, v, ke, ve)]
        phi = [taylor_features(x) for x in (wide[0], wide[1], wide[3])]
        causal, full = (phi[0] @ phi[1].mT).tril(), phi[0] @ phi[2].mT
        want = (causal @ wide[2] + full @ wide[4]) / (causal.sum(-1) + full.sum(-1))[..., None]
        assert error(o, want) < 1e-5
        g = torch.randn_like(o)
        for x, y in zip(torch.autograd.grad(o, leaves, g), torch.autograd.grad(want, wide, g.double()), strict=True):
            assert error(x, y) < 1e-5
        step, _ = linear_attention_step(q[..., 0, :], k[..., 0, :], v[..., 0, :], S0, features="taylor", normalize=True)
        torch.testing.assert_close(step, o[..., 0, :])

    def test_of_no_tokens_is_the_causal_form(self, backend):
        q, k, v = inputs(1, 1, 9, 3, 4, features="elu", state=False)
        S0 = linear_attention_state(k[..., :0, :], v[..., :0, :], features="elu", normalize=True)
        run = functools.partial(linear_attention, q, k, v, features="elu", normalize=True, backend=backend)
        assert torch.equal(run(S0)[0], run()[0])

    def test_padding_does_not_count_where_its_features_are_zero(self, backend):
        q, k, v = inputs(1, 1, 9, 3, 4, features="elu", state=False)
        kept = (torch.arange(9, device=DEVICE) >= 4)[:, None]
        o, _ = linear_attention(
            elu_features(q), (elu_features(k) * kept).requires_grad_(), v, normalize=True, backend=backend
        )
        want, _ = linear_attention(
            q[..., 4:, :], k[..., 4:, :], v[..., 4:, :], features="elu", normalize=True, backend=backend
        )
        torch.testing.assert_close(o[..., 4:, :], want)
        assert (o[..., :4, :] == 0).all()


@ALL
class TestNormaliser:
    def test_equal_keys_give_the_running_mean(self, backend):
        q, k, v = inputs(1, 1, 70, 3, 4, features="taylor", state=False)
        o, _ = linear_attention(q, torch.ones_like(k), v, features="taylor", normalize=True, backend=backend)
        mean = v.cumsum(2) / torch.arange(1, 71, device=DEVICE)[:, None]
        torch.testing.assert_close(o, mean, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("decay", ["token", "feature"])
    def test_the_weight_of_a_single_value_does_not_matter(self, backend, decay):
        q, k, v, log_decay = inputs(1, 1, 70, 3, 4, features="elu", decay=decay, kind="nothing", state=False)
        q, k = q.requires_grad_(), k.requires_grad_()
        o, _ = linear_attention(q, k, v, log_decay=log_decay, features="elu", normalize=True, backend=backend)
        torch.testing.assert_close(o, v)
        for x in torch.autograd.grad((o * v.cos()).sum(), (q, k)):
            torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-5)

    def test_sums_near_zero_are_raised_to_eps(self, backend):
        """Weights 1, -1, 2e-4, ...: their running sum is 1, 0, then below eps on either side."""
        k = torch.tensor([1.0, -1.0, 2e-4, -4e-4, 1.0], device=DEVICE)[None, None, :, None].requires_grad_()
        v = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=DEVICE)[None, None, :, None]
        q = torch.ones_like(k)
        o, S = linear_attention(q, k, v, normalize=True, eps=1e-3, backend=backend)
        sums = (k * v).cumsum(2)[..., 0]
        want = sums / torch.tensor([1.0, torch.inf, 1e-3, -1e-3, 1 - 2e-4], device=DEVICE)
        torch.testing.assert_close(o[..., 0], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(S[0, 0, 0, 1], k.sum())
        assert torch.isfinite(torch.autograd.grad(o.sum(), k)[0]).all()

    def test_random_signs_stay_finite(self, backend):
        q, k, v = (x.requires_grad_() for x in inputs(1, 2, 130, 2, 3, state=False))
        o, S = linear_attention(q, k, v, normalize=True, backend=backend)
        assert all(torch.isfinite(x).all() for x in (o, S, *torch.autograd.grad(o.sum() + S.sum(), (q, k, v))))


@ALL
class TestDecay:
    def test_retention_is_attention_with_a_power_of_the_distance(self, backend):
        q, k, v = inputs(1, 2, 70, 4, 3, state=False)
        gamma = torch.tensor([0.9, 0.99], dtype=torch.float64, device=DEVICE)
        log_decay = gamma.log()[None, :, None].expand(1, 2, 70).float()
        o, _ = linear_attention(q, k, v, log_decay=log_decay, backend=backend)
        t = torch.arange(70, device=DEVICE)
        powers = (gamma[:, None, None] ** (t[:, None] - t)).tril()
        assert error(o, (q.double() @ k.double().mT * powers) @ v.double()) < 1e-5

    @pytest.mark.parametrize("features", [None, "taylor"])
    def test_one_rate_for_all_features_is_one_rate_per_token(self, backend, features):
        q, k, v, S0, log_decay = inputs(1, 2, 70, 3, 4, features=features, decay="token")
        each = log_decay[..., None].expand(-1, -1, -1, width(features, 3))
        run = functools.partial(linear_attention, q, k, v, S0, features=features, backend=backend)
        for x, y in zip(run(log_decay=log_decay), run(log_decay=each), strict=True):
            assert error(x, y) < 1e-5

    @pytest.mark.parametrize("decay", ["token", "feature"])
    @pytest.mark.parametrize("value", [-torch.inf, -320.0])
    def test_a_reset_forgets_even_a_huge_past(self, backend, decay, value):
        q, k, v, S0, log_decay = inputs(1, 1, 70, 3, 4, decay=decay)
        log_decay[:, :, 33] = value
        v[:, :, :33] *= 1e20
        o, S = linear_attention(q, k, v, S0 * 1e20, log_decay=log_decay, backend=backend)
        after = [x[:, :, 33:] for x in (q, k, v, log_decay)]
        fresh, last = linear_attention(*after[:3], log_decay=after[3], backend=backend)
        torch.testing.assert_close(o[:, :, 33:], fresh, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(S, last, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("decay", ["token", "feature"])
    def test_hard_resets_cost_no_digits_between_them(self, backend, decay):
        """After 40 decays of e^-320 two neighbours still see each other exactly."""
        q, k, v, log_decay = inputs(1, 1, 64, 3, 4, decay=decay, state=False)
        log_decay[:, :, :40], log_decay[:, :, 40:] = -320.0, -0.01
        o, _ = linear_attention(q, k, v, log_decay=log_decay, backend=backend)
        fresh, _ = linear_attention(
            *(x[:, :, 39:].double() for x in (q, k, v)), log_decay=log_decay[:, :, 39:].double(), backend="reference"
        )
        assert error(o[:, :, 39:], fresh) < 1e-6


@ALL
@pytest.mark.parametrize("decay", ["none", "token", "feature"])
class TestLaws:
    def make(self, decay, T=71, **more):
        return inputs(1, 2, T, 3, 4, features="elu", normalize=True, decay=decay, **more)

    def run(self, backend, q, k, v, S0=None, log_decay=None):
        return linear_attention(q, k, v, S0, log_decay=log_decay, features="elu", normalize=True, backend=backend)

    def test_two_pieces_equal_the_whole(self, backend, decay):
        q, k, v, S0, *rest = (x.requires_grad_() for x in self.make(decay))
        whole, last = self.run(backend, q, k, v, S0, *rest)
        first, state = self.run(backend, *(x[:, :, :33] for x in (q, k, v)), S0, *(x[:, :, :33] for x in rest))
        second, state = self.run(backend, *(x[:, :, 33:] for x in (q, k, v)), state, *(x[:, :, 33:] for x in rest))
        joined = torch.cat([first, second], dim=2)
        torch.testing.assert_close(joined, whole)
        torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
        g = torch.randn_like(whole)
        leaves = (q, k, v, S0, *rest)
        got, want = torch.autograd.grad(joined, leaves, g), torch.autograd.grad(whole, leaves, g)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_steps_equal_the_whole(self, backend, decay):
        q, k, v, S, *rest = self.make(decay, T=40)
        whole, last = self.run(backend, q, k, v, S, *rest)
        for t in range(40):
            log_decay = rest[0][:, :, t] if rest else None
            o, S = linear_attention_step(
                q[:, :, t], k[:, :, t], v[:, :, t], S, log_decay=log_decay, features="elu", normalize=True
            )
            torch.testing.assert_close(o, whole[:, :, t])
        torch.testing.assert_close(S, last, rtol=1e-5, atol=1e-5)

    def test_later_tokens_cannot_change_earlier_outputs(self, backend, decay):
        tensors = self.make(decay)
        o, _ = self.run(backend, *tensors)
        for t in (1, 31, 40, 64):
            changed = [x.clone() for x in tensors]
            for x in changed[:3]:
                x[:, :, t] += 3
            for x in changed[4:]:
                x[:, :, t] -= 1
            other, _ = self.run(backend, *changed)
            assert torch.equal(o[:, :, :t], other[:, :, :t])
            assert not torch.equal(o[:, :, t], other[:, :, t])

    def test_strides_do_not_matter(self, backend, decay):
        q, k, v, S0, *rest = self.make(decay, T=20)
        strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v, *rest)]
        want = self.run(backend, q, k, v, S0, *rest)
        state = S0.mT.contiguous().mT
        torch.testing.assert_close(self.run(backend, *strided[:3], state, *strided[3:]), want)

    def test_two_runs_are_bit_identical(self, backend, decay):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in self.make(decay)]
            o, S = self.run(backend, *tensors)
            results.append((o, S, *torch.autograd.grad((o * o).sum() + S.sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_empty_sequence_returns_the_state(self, backend, decay):
        q, k, v, S0, *rest = self.make(decay, T=0)
        o, S = self.run(backend, q, k, v, S0, *rest)
        assert o.shape == (1, 2, 0, 4) and torch.equal(S, S0)

    def test_the_output_has_the_dtype_of_v_and_the_state_is_float32(self, backend, decay):
        q, k, v, S0, *rest = self.make(decay, T=8, dtype=torch.bfloat16)
        o, S = self.run(backend, q, k, v, S0, *rest)
        assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
        first = (x[:, :, 0] for x in (q, k, v))
        o, S = linear_attention_step(*first, S0, features="elu", normalize=True)
        assert o.dtype == torch.bfloat16 and S.dtype == torch.float32


@ALL
def test_sums_beyond_the_range_of_float16(backend):
    """The state would overflow in float16; it is kept in float32, and the outputs are divided before they are rounded."""
    q, k, v, S0 = inputs(1, 1, 70, 3, 4, torch.float16, "taylor", True)
    S0 = S0 * 1e5
    assert not torch.isfinite(S0.half()).all()
    tensors = [x.requires_grad_() for x in (q, k, v, S0)]
    o, _ = linear_attention(*tensors, features="taylor", normalize=True, backend=backend)
    want, _ = linear_attention(*(x.double() for x in tensors), features="taylor", normalize=True, backend="reference")
    assert error(o, want) < 2e-3
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(o.sum(), tensors))


def test_16384_tokens_in_float16():
    q, k, v = inputs(1, 1, 16384, 16, 4, torch.float16, "taylor", state=False)
    o, S = linear_attention(q, k, v.abs(), features="taylor", normalize=True)
    weights = taylor_features(q[..., -1:, :].double()) @ taylor_features(k.double()).mT
    assert S.max() > torch.finfo(torch.float16).max / 4
    assert error(o[..., -1:, :], weights @ v.abs().double() / weights.sum(-1, keepdim=True)) < 2e-3


def test_65536_tokens():
    """One head without decay, a sum over the whole past, and one with; a single loop of the definition serves both."""
    q, k, v, S0, log_decay = inputs(1, 2, 65536, 2, 2, decay="feature")
    log_decay[:, 0] = 0
    with torch.no_grad():
        wide = [x.double() for x in (q, k, v, S0)]
        want, last = linear_attention(*wide, log_decay=log_decay.double(), backend="reference")
    for head, decay in ((0, None), (0, log_decay[:, :1, :, 0]), (1, log_decay[:, 1:])):
        o, S = linear_attention(*(x[:, head, None] for x in (q, k, v, S0)), log_decay=decay, backend="parallel")
        assert error(o, want[:, head, None]) < 1e-5 and error(S, last[:, head, None]) < 1e-5


@pytest.mark.parametrize("decay", ["none", "token", "feature"])
def test_memory_is_linear_in_length(decay):
    def make(T):
        return inputs(1, 1, T, 4, 8, features="elu", normalize=True, decay=decay)

    run = runner("parallel", features="elu", normalize=True)
    assert_memory_is_linear(run, make, lengths=(1024, 2048, 4096))


def test_taylor_features_of_all_tokens_are_never_there_at_one_time():
    saved = 0

    def pack(x):
        nonlocal saved
        saved += x.numel()
        return x

    T, D, E = 4096, 16, 8
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, T, D, E, state=False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_attention(q, k, v, features="taylor", backend="parallel")
    assert saved < T * 273 / 2


@pytest.mark.parametrize("decay", ["none", "token", "feature"])
def test_compiled_without_graph_break(decay):
    q, k, v, *rest = inputs(1, 1, 20, 3, 2, features="elu", normalize=True, decay=decay)
    run = runner("triton", features="elu", normalize=True)
    tensors = [x.requires_grad_() for x in (q, k, v, *rest)]
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: run(*x)[0] * 2, backend="aot_eager", fullgraph=True)
    want = run(*tensors)[0] * 2
    got = compiled(*tensors)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors))


@ALL
def test_what_lies_behind_the_end_does_not_leak(backend):
    """The tensors are views into longer ones that go on with NaN."""
    q, k, v = inputs(1, 1, 80, 3, 4, state=False)
    log_decay = -torch.rand(1, 1, 80, 3, device=DEVICE)
    for x in (q, k, v, log_decay):
        x[:, :, 70:] = torch.nan
    views = [x[:, :, :70].requires_grad_() for x in (q, k, v, log_decay)]
    o, S = linear_attention(*views[:3], log_decay=views[3], backend=backend)
    assert all(torch.isfinite(x).all() for x in (o, S, *torch.autograd.grad(o.sum() + S.sum(), views)))


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    q, k, v = inputs(1, 1, 9, 2, 2, torch.float64, state=False)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        linear_attention(q, k, v)
    linear_attention(q, k, v)


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(1, 1, 10, 4, 6) == 10 * (2 * 4 + 2 * 6) * 4
    assert cost.bytes(1, 1, 10, 4, 6, backward=True) > cost.bytes(1, 1, 10, 4, 6)
    assert cost.flops(2, 3, 10, 4, 6) == 6 * cost.flops(1, 1, 10, 4, 6)
    S = linear_attention(*inputs(2, 4, 5, 3, 8, state=False), features="taylor", normalize=True)[1]
    assert cost.state_floats(2, 4, 13, 8, normalize=True) == S.numel()


q, k, v, S0, log_decay = inputs(2, 3, 8, 4, 5, decay="token")


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((q[0], k, v), {}, r"expected q of shape \(B, H, T, D\), got \(3, 8, 4\)"),
        ((q, k[..., :2], v), {}, r"expected k of shape \(B, H, T, D\) with .*D = 4, got \(2, 3, 8, 2\)"),
        ((q, k, v[:, :, :5]), {}, r"expected v of shape \(B, H, T, E\) with .* got \(2, 3, 5, 5\)"),
        ((q, k, v[..., :0]), {}, r"expected v with E of at least 1, got \(2, 3, 8, 0\)"),
        ((q[..., :0], k[..., :0], v), {}, r"expected q with D of at least 1, got \(2, 3, 8, 0\)"),
        ((q.long(), k, v), {}, "expected q of a floating-point dtype, got torch.int64"),
        ((q, k.half(), v), {}, "expected k of dtype torch.float32 like q, got torch.float16"),
        ((q, k, v, S0[..., :1]), {}, r"expected S0 of shape \(B, H, F, E\) with .*F = 4.* got \(2, 3, 4, 1\)"),
        ((q, k, v, S0), {"normalize": True}, r"expected S0 of shape \(B, H, F, E\+1\) with .*E\+1 = 6, got"),
        ((q, k, v, S0), {"features": "taylor"}, r"expected S0 of shape \(B, H, F, E\) with .*F = 21"),
        ((q, k, v), {"features": "relu"}, "expected features to be None, 'elu' or 'taylor', got 'relu'"),
        (
            (q, k, v),
            {"log_decay": log_decay[:, :2]},
            r"expected log_decay of shape \(B, H, T\) with .* got \(2, 2, 8\)",
        ),
        ((q, k, v), {"log_decay": v}, r"expected log_decay of shape \(B, H, T, F\) with .* got \(2, 3, 8, 5\)"),
        ((q.to("meta"), k, v), {}, "expected k on meta like q, got"),
        (([1.0], k, v), {}, "expected q to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(*arguments, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((q, k[..., 0, :], v[..., 0, :]), r"expected q of shape \(B, H, D\), got \(2, 3, 8, 4\)"),
        ((q[..., 0, :], k[..., 0, :], v[:1, :, 0]), r"expected v of shape \(B, H, E\) with B = 2, H = 3"),
        ((q[..., 0, :], k[..., 0, :], v[..., 0, :], S0[:1]), r"expected S0 of shape \(B, H, F, E\)"),
    ],
)
def test_errors_of_a_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_attention_step(*arguments)


def test_errors_of_a_prompt():
    with pytest.raises(ValueError, match=r"expected v of shape \(B, H, M, E\) with B = 2, H = 3, M = 8"):
        linear_attention_state(k, v[:, :, :4])


def test_wide_taylor_features_need_another_backend():
    q, k, v = inputs(1, 1, 3, 65, 2, features="taylor", state=False)
    with pytest.raises(ValueError, match="its Taylor features take D up to 64, got 65"):
        linear_attention(q, k, v, features="taylor", backend="triton")
    linear_attention(q, k, v, features="taylor")


def test_debug_names_the_input_with_nan():
    broken = v.clone()
    broken[0, 0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected v without NaN, got 1 NaN"):
        linear_attention(q, k, broken)
