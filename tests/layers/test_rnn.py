"""RNN, LSTM and GRU: against torch.nn, streaming, causality, lengths, and clear errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.layers.rnn import GRU, LSTM, RNN, length_mask, reverse_within_length

KINDS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, *sizes, **options):
    torch.manual_seed(0)
    return KINDS[kind](*sizes, **options).double()


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def copy_to_torch(ours, theirs):
    """Give a torch.nn layer our weights; its second bias is ours only for the GRU."""
    for number in range(ours.num_layers):
        for suffix, layers in (("", ours.layers), ("_reverse", ours.backward_layers)):
            if layers is None:
                continue
            layer = layers[number]
            for name, value in (
                ("weight_ih", layer.w_x),
                ("weight_hh", layer.w_h),
                ("bias_ih", layer.b),
                ("bias_hh", getattr(layer, "b_h", torch.zeros_like(layer.b))),
            ):
                getattr(theirs, f"{name}_l{number}{suffix}").data.copy_(value.data)


@every_kind
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_agrees_with_torch_nn(kind, num_layers, bidirectional):
    ours = build(kind, 4, 6, num_layers, bidirectional=bidirectional)
    torch.nn.init.normal_(ours.layers[0].b)
    if kind == "gru":
        torch.nn.init.normal_(ours.layers[0].b_h)
    theirs = getattr(torch.nn, kind.upper())(4, 6, num_layers, batch_first=True, bidirectional=bidirectional).double()
    copy_to_torch(ours, theirs)
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    lengths = torch.tensor([9, 1, 5])
    got, state = ours(x)
    want, their_state = theirs(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    for one, other in zip(parts(state), parts(their_state), strict=True):
        torch.testing.assert_close(one, other.transpose(0, 1), rtol=0, atol=1e-10)
    # ... and with lengths, against packed sequences
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed_out, their_state = theirs(packed)
    want, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_out, batch_first=True)
    got, state = ours(x, lengths=lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    for one, other in zip(parts(state), parts(their_state), strict=True):
        torch.testing.assert_close(one, other.transpose(0, 1), rtol=0, atol=1e-10)


@every_kind
def test_streaming_in_pieces_and_in_steps(kind):
    model = build(kind, 3, 5, 2)
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    whole, final = model(x)
    first, state = model(x[:, :7])
    second, state = model(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    stepped, steps = None, []
    for t in range(20):
        out, stepped = model.step(x[:, t], stepped)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    for end in (state, stepped):
        for one, other in zip(parts(end), parts(final), strict=True):
            torch.testing.assert_close(one, other)


@every_kind
def test_causality(kind):
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    one_way, two_way = build(kind, 3, 5), build(kind, 3, 5, bidirectional=True)
    h, g = one_way(x)[0], one_way(changed)[0]
    assert torch.equal(h[:, :4], g[:, :4]) and not torch.equal(h[:, 4:], g[:, 4:])
    h, g = two_way(x)[0], two_way(changed)[0]
    assert (h != g).any(-1).all(), "every step of a bidirectional network sees every input"


@every_kind
@settings(max_examples=25)
@given(
    bidirectional=st.booleans(),
    layers=st.integers(1, 2),
    padding=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_padding_changes_nothing(kind, bidirectional, layers, padding, seed):
    """More padding, and anything in it: same outputs, states and gradients; sequences alone give the same as together."""
    g = torch.Generator().manual_seed(seed)
    model = build(kind, 3, 4, layers, bidirectional=bidirectional)
    lengths = torch.randint(1, 7, (4,), generator=g)
    lengths[0] = 6
    x = torch.randn(4, 6, 3, generator=g, dtype=torch.float64)
    longer = torch.cat([x, torch.full((4, padding, 3), float("nan"), dtype=torch.float64)], 1)
    longer[~length_mask(lengths, 6 + padding)] = float("inf")
    results = []
    for data in (x, longer):
        out, state = model(data, lengths=lengths)
        model.zero_grad()
        out[:, :6].square().sum().backward()
        results.append((out[:, :6], parts(state), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    assert not out[~length_mask(lengths, 6 + padding)].any()
    for b, n in enumerate(lengths.tolist()):
        alone, state = model(x[b : b + 1, :n])
        torch.testing.assert_close(results[0][0][b : b + 1, :n], alone)
        for one, other in zip(results[0][1], parts(state), strict=True):
            torch.testing.assert_close(one[b : b + 1], other)


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_reverse_within_length(lengths):
    x = torch.arange(len(lengths) * 7).view(len(lengths), 7, 1)
    turned = reverse_within_length(x, torch.tensor(lengths))
    for row, new, n in zip(x, turned, lengths, strict=True):
        assert torch.equal(new[:n], row[:n].flip(0)) and torch.equal(new[n:], row[n:])
    assert torch.equal(reverse_within_length(turned, torch.tensor(lengths)), x)
    assert torch.equal(reverse_within_length(x), x.flip(1))


@every_kind
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_agree(kind, backend):
    torch.manual_seed(0)
    model = KINDS[kind](3, 5, backend="parallel").to("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(2, 6, 3, device=next(model.parameters()).device)
    want, _ = model(x)
    model.backend = backend
    torch.testing.assert_close(model(x)[0], want, rtol=1e-5, atol=1e-5)


def test_initial_values():
    lstm, gru = LSTM(3, 8, forget_bias=5.0), GRU(3, 8, forget_bias=2.0)
    assert lstm.layers[0].b.view(4, 8).mean(1).tolist() == [0.0, 5.0, 0.0, 0.0]
    assert gru.layers[0].b.view(3, 8).mean(1).tolist() == [0.0, 2.0, 0.0] and not gru.layers[0].b_h.any()
    assert all(p.abs().max() <= 8**-0.5 for p in (lstm.layers[0].w_x, lstm.layers[0].w_h, gru.layers[0].w_h))
    assert LSTM(3, 8).layers[0].b.view(4, 8)[1].eq(1.0).all()


def test_parameter_counts():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(RNN(16, 64)) == 64 * (16 + 64 + 1)
    assert count(LSTM(16, 32)) == 4 * 32 * (16 + 32 + 1)
    assert count(GRU(16, 36)) == 3 * 36 * (16 + 36 + 2)
    assert count(LSTM(16, 32, 2, bidirectional=True)) == 2 * 4 * 32 * (16 + 32 + 1) + 2 * 4 * 32 * (64 + 32 + 1)


class TestStaticInput:
    def test_once_per_sequence_equals_at_every_step(self):
        """W_s x added once is the same as x beside every input, with its columns in W_x."""
        ours, plain = build("lstm", 4, 5, 2, static_size=3), build("lstm", 7, 5, 2)
        plain.load_state_dict(
            {k: v for k, v in ours.state_dict().items() if k != "static.weight"}
            | {"layers.0.w_x": torch.cat([ours.layers[0].w_x, ours.static.weight], dim=1)}
        )
        x, fixed = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        got, _ = ours(x, x_static=fixed)
        want, _ = plain(torch.cat([x, fixed[:, None].expand(2, 6, 3)], dim=-1))
        torch.testing.assert_close(got, want)
        state = None
        for t in range(6):
            out, state = ours.step(x[:, t], state, fixed)
            torch.testing.assert_close(out, got[:, t])

    @pytest.mark.parametrize(
        "size, given, message",
        [
            (3, None, r"expected x_static of shape \(B, static_size\) = \(2, 3\), got None"),
            (3, torch.zeros(2, 4), r"expected x_static of shape .* = \(2, 3\), got \(2, 4\)"),
            (None, torch.zeros(2, 4), "expected x_static=None: this LSTM was made without static_size"),
        ],
    )
    def test_errors(self, size, given, message):
        with pytest.raises(ValueError, match=message):
            LSTM(4, 5, static_size=size)(torch.zeros(2, 6, 4), x_static=given)

    def test_error_for_two_directions(self):
        with pytest.raises(ValueError, match="expected static_size of at least 1 in a one-directional LSTM, got 3"):
            LSTM(4, 5, static_size=3, bidirectional=True)


class TestContinuation:
    @pytest.mark.parametrize("num_layers", [1, 2])
    def test_packed_sequences_equal_separate_ones(self, num_layers):
        layer, x = build("lstm", 4, 5, num_layers), torch.randn(2, 9, 4, dtype=torch.float64)
        cont = torch.ones(2, 9)
        cont[:, [0, 4]] = 0
        packed, state = layer(x, cont=cont)
        first, _ = layer(x[:, :4])
        second, alone = layer(x[:, 4:])
        torch.testing.assert_close(packed, torch.cat([first, second], dim=1))
        torch.testing.assert_close(state, alone)
        assert not torch.allclose(layer(x)[0][:, 4:], second, atol=1e-3)

    def test_flags_in_the_padding_change_nothing(self):
        layer, x = build("lstm", 4, 5), torch.randn(2, 9, 4, dtype=torch.float64)
        cont, lengths = torch.ones(2, 9), torch.tensor([6, 9])
        want, state = layer(x, lengths=lengths, cont=cont)
        cont[0, 6:] = 0
        got, same = layer(x, lengths=lengths, cont=cont)
        torch.testing.assert_close((got, same), (want, state))

    def test_error_for_two_directions(self):
        with pytest.raises(ValueError, match="expected cont=None in a bidirectional LSTM"):
            LSTM(4, 5, bidirectional=True)(torch.zeros(2, 6, 4), cont=torch.ones(2, 6))


@every_kind
def test_dropout_between_layers_only_in_training(kind):
    model = build(kind, 3, 8, 2, dropout=0.5)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    single = build(kind, 3, 8, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0]), "a single layer has nothing between layers"


def test_the_state_may_be_detached_and_carried():
    """Truncated backpropagation: the state is the same, the gradient is cut."""
    model = build("lstm", 3, 4)
    x = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    _, state = model(x[:, :4])
    out, _ = model(x[:, 4:], tuple(s.detach() for s in state))
    grad = torch.autograd.grad(out.sum(), x)[0]
    assert not grad[:, :4].any() and grad[:, 4:].any()


x = torch.randn(2, 6, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LSTM(3, 4)(x[0]), r"expected x of shape \(B, T, D\) with D = 3, got \(6, 3\)"),
        (lambda: LSTM(4, 4)(x), r"expected x of shape \(B, T, D\) with D = 4, got \(2, 6, 3\)"),
        (lambda: GRU(3, 4)(x[:, :0]), r"expected x with at least one step \(T >= 1\), got \(2, 0, 3\)"),
        (
            lambda: RNN(3, 4)(x, torch.zeros(2, 4)),
            r"state of shape \(B, layers, H\) = \(2, 1, 4\), got \(2, 4\)",
        ),
        (lambda: RNN(3, 4)(x, torch.zeros(2, 1, 5)), r"= \(2, 1, 4\), got \(2, 1, 5\)"),
        (lambda: LSTM(3, 4)(x, (torch.zeros(2, 1, 4),)), "expected state to hold 2 tensors, got 1"),
        (
            lambda: LSTM(3, 4)(x, lengths=torch.tensor([7, 6])),
            "expected lengths between 1 and T = 6, got values from 6 to 7",
        ),
        (
            lambda: LSTM(3, 4)(x, lengths=torch.tensor([0, 6])),
            "expected lengths between 1 and T = 6, got values from 0 to 6",
        ),
        (
            lambda: LSTM(3, 4)(x, lengths=torch.tensor([6])),
            r"integers of shape \(B,\) with B = 2, got .* shape \(1,\)",
        ),
        (
            lambda: LSTM(3, 4)(x, lengths=torch.tensor([6.0, 2.0])),
            "expected lengths to be integers .* got torch.float32",
        ),
        (lambda: LSTM(3, 4, bidirectional=True).step(x[:, 0]), "expected a one-directional layer"),
        (lambda: GRU(3, 4).step(x), r"expected x of shape \(B, D\) with D = 3, got \(2, 6, 3\)"),
        (
            lambda: RNN(3, 4, activation="sigmoid"),
            "expected activation to be one of tanh, relu, got 'sigmoid'",
        ),
        (lambda: GRU(3, 0), "expected hidden_size to be at least 1, got 0"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
