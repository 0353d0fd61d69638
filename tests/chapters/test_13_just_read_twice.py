"""Chapter 13: listeners, linear attention, prefix attention and its state; exercise checks that tell right from wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.data.recall import table_documents
from seqarch.kernels import linear_attention
from tests.notebooks import load_definitions

chapter = load_definitions("13-just-read-twice")


def features(B, N, f, g=None):
    return chapter.taylor_map(torch.randn(B, N, f, dtype=torch.float64, generator=g))


class TestListeners:
    @settings(max_examples=50, deadline=None)
    @given(st.sets(st.integers(0, 60), max_size=30), st.sets(st.integers(0, 60), max_size=30))
    def test_one_reading_finds_all_and_holds_the_first_set(self, a, b):
        found, held = chapter.one_pass(sorted(a), sorted(b))
        assert set(found) == a & b and held == len(a)

    @settings(max_examples=50, deadline=None)
    @given(st.sets(st.integers(0, 60), max_size=30), st.sets(st.integers(0, 60), max_size=30))
    def test_two_readings_hold_the_smaller_set(self, a, b):
        memory = chapter.Memory()
        found = chapter.solve_two_pass(sorted(a), sorted(b), memory)
        assert set(found) == a & b and memory.peak <= min(len(a), len(b))

    def test_the_formula_at_its_ends(self):
        assert chapter.predicted(8, 1, 64) == pytest.approx(1)  # one candidate cannot be missed
        assert chapter.predicted(50, 20, 10**9) == pytest.approx(1)
        assert chapter.predicted(10**6, 20, 2) == pytest.approx(1 / 20, abs=0.01)  # noise alone: chance

    @pytest.mark.parametrize(("first", "second"), [(8, 128), (128, 8), (20, 20)])
    def test_the_machine_follows_the_formula(self, first, second):
        g = torch.Generator().manual_seed(5)
        causal, twice = chapter.memory_machine(first, second, 64, 1000, g)
        small, large = sorted((first, second))
        assert causal == pytest.approx(chapter.predicted(first, second, 64), abs=0.08)
        assert twice == pytest.approx(chapter.predicted(small, large, 64), abs=0.08)


class TestLinearAttention:
    @settings(max_examples=20, deadline=None)
    @given(N=st.integers(1, 70), f=st.sampled_from([1, 2, 4, 8, 16]), seed=st.integers(0, 999))
    def test_loop_square_and_kernel_agree(self, N, f, seed):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(2, N, n, dtype=torch.float64, generator=g) for n in (f, f, 3))
        want = chapter.linear_attention_loop(chapter.taylor_map(q), chapter.taylor_map(k), v)
        square = chapter.linear_attention_square(chapter.taylor_map(q), chapter.taylor_map(k), v)
        kernel = linear_attention(q[:, None], k[:, None], v[:, None], features="taylor", normalize=True)[0][:, 0]
        torch.testing.assert_close(square, want, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(kernel, want, rtol=1e-8, atol=1e-9)

    @settings(max_examples=20, deadline=None)
    @given(N=st.integers(1, 30), M=st.integers(0, 30), seed=st.integers(0, 999))
    def test_prefix_attention_has_three_equal_forms(self, N, M, seed):
        M, g = min(M, N), torch.Generator().manual_seed(seed)
        q, k, ke = (features(2, n, 3, g) for n in (N, N, M))
        v, ve = (torch.randn(2, n, 4, dtype=torch.float64, generator=g) for n in (N, M))
        want = chapter.pla_loop(q, k, v, ke, ve)
        start = chapter.linear_attention_state(ke[:, None], ve[:, None], normalize=True)
        fast = linear_attention(q[:, None], k[:, None], v[:, None], start, normalize=True)[0][:, 0]
        torch.testing.assert_close(fast, want, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(chapter.solve_pla(q, k, v, ke, ve), want, rtol=1e-8, atol=1e-9)

    def test_without_a_prefix_it_is_causal_and_without_causal_keys_an_average(self):
        q, k, ke = features(2, 9, 3), features(2, 9, 3), features(2, 5, 3)
        v, ve = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
        none = chapter.pla_loop(q, k, v, ke[:, :0], ve[:, :0])
        torch.testing.assert_close(none, chapter.linear_attention_square(q, k, v))
        weights = q @ ke.mT
        torch.testing.assert_close(chapter.pla_loop(q, 0 * k, v, ke, ve), weights @ ve / weights.sum(-1, keepdim=True))


class TestModels:
    @pytest.mark.parametrize("kind", ["conv", "window", "linear", "prefix"])
    @pytest.mark.parametrize("mlp", [True, False])
    def test_pieces_are_the_whole(self, kind, mlp):
        torch.manual_seed(0)
        model = chapter.Based(20, [kind] * 2, 12, 2, 3, window=4, mlp=mlp)
        x, states, outputs = torch.randint(20, (3, 25)), None, []
        M = 10 if kind == "prefix" else 0
        with torch.no_grad():
            for piece in (x[:, :10], x[:, 10:11], *x[:, 11:].split(7, dim=1)):
                y, states = model.run(piece, states, M if not outputs else 0)
                outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, 1), model(x, M), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("M", [0, 1, 7, 16])
    def test_who_sees_whom(self, M):
        torch.manual_seed(0)
        layer = chapter.LinearAttention(8, 2, 3, prefix=True).double()
        x = torch.randn(1, 16, 8, dtype=torch.float64)
        moves = torch.zeros(16, 16, dtype=torch.bool)
        for j in range(16):
            other = x.clone()
            other[:, j] += 1
            moves[:, j] = ((layer(other, M=M)[0] - layer(x, M=M)[0]).abs().amax((0, 2)) > 1e-10).detach()
        assert torch.equal(moves, chapter.sight(M) > 0)

    @pytest.mark.parametrize("M", [-1, 17])
    def test_a_prefix_must_fit(self, M):
        with pytest.raises(ValueError, match=f"expected a prefix of 0 to 16 tokens.*got M = {M}"):
            chapter.LinearAttention(8, 2, 3, prefix=True)(torch.randn(1, 16, 8), M=M)

    def test_every_parameter_learns(self):
        torch.manual_seed(0)
        model = chapter.Based(51, ["conv", "prefix", "window"], 12, 2, 3)
        batch = chapter.alternating(prefix=True)(0, torch.Generator().manual_seed(0))
        chapter.recall_loss(model, batch).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]

    def test_rotary_scores_depend_on_the_distance(self):
        q, k = torch.randn(2, 1, 1, 1, 8).unbind()
        at = lambda i, j: (chapter.rotary(q, i) * chapter.rotary(k, j)).sum()  # noqa: E731
        torch.testing.assert_close(at(9, 4), at(105, 100), rtol=0, atol=1e-4)


class TestTraining:
    def test_targets(self):
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 50, (40, 30))
        inputs, following, masked = chapter.jrt_batch(tokens, 12, 0, g)
        hidden = inputs == 0
        assert hidden.any() and not hidden[:, 11:].any()
        assert torch.equal(inputs[~hidden], tokens[~hidden])
        assert torch.equal(masked >= 0, hidden) and torch.equal(masked[hidden], tokens[hidden])
        assert (following[:, :11] == -100).all() and (following[:, -1] == -100).all()
        assert torch.equal(following[:, 11:-1], tokens[:, 12:])

    def test_the_loss_is_the_weighted_mean(self):
        torch.manual_seed(0)
        model = chapter.Based(51, ["conv", "prefix"], 12, 2, 3)
        inputs, following, masked, M = chapter.with_answers(1, torch.Generator().manual_seed(0))
        loss, parts = chapter.jrt_loss(model, (inputs, following, masked, M), w1=3.0, w2=1.0)
        assert loss.item() == pytest.approx((3 * parts["next"] + parts["masked"]) / 4, rel=1e-5)
        logits = model(inputs, int(M))
        want = F.cross_entropy(logits[masked >= 0], masked[masked >= 0])
        assert parts["masked"] == pytest.approx(want.item(), rel=1e-5)

    @pytest.mark.parametrize("p", [1, 2, 3])
    def test_targets_stand_in_the_last_reading(self, p):
        x, y = chapter.prompts("long first", 4, torch.Generator().manual_seed(0), p)
        once = chapter.prompts("long first", 4, torch.Generator().manual_seed(0))
        n = once[0].shape[1]
        assert torch.equal(x, once[0].repeat(1, p)) and torch.equal(y[:, -n:], once[1]) and (y[:, :-n] == -100).all()


class Answering(torch.nn.Module):
    """Knows the answer: finds the last earlier place of the present token and names what stood behind it."""

    def __init__(self, V):
        super().__init__()
        self.V, self.nothing = V, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, M=0):
        logits = torch.zeros(*tokens.shape, self.V)
        for b, row in enumerate(tokens.tolist()):
            for i, token in enumerate(row):
                earlier = [j for j in range(0, min(i, M - 1), 2) if row[j] == token]
                if earlier:
                    logits[b, i, row[earlier[-1] + 1]] = 1.0
        return logits


class TestSets:
    def test_batches_take_the_sizes_in_turn(self):
        batches = chapter.set_batches(((2, 5), (5, 2), (3, 3)), 8, 4, 30, torch.Generator().manual_seed(0))
        assert len(batches) == 6 and all(x.shape[0] == len(y) == 4 for x, y in batches)
        for i, (x, common) in enumerate(batches):
            first = ((2, 5), (5, 2), (3, 3))[i % 3][0]
            assert (x[:, first + 1] == 2).all()
            a, b = x[:, 1 : first + 1], x[:, first + 2 : -1]
            assert ((a == common[:, None]).sum(1) == 1).all() and ((b == common[:, None]).sum(1) == 1).all()

    @pytest.mark.parametrize(("p", "prefix"), [(1, False), (2, False), (1, True)])
    def test_the_last_token_of_the_last_reading_answers(self, p, prefix):
        torch.manual_seed(0)
        model = chapter.Based(30, ["conv", "prefix"], 8, 2, 3, mlp=False)
        x = torch.randint(30, (3, 11))
        want = model(torch.cat([x] * p, 1), 11 if prefix else 0)[:, -1]
        torch.testing.assert_close(chapter.name_common(model, x, p, prefix), want)
        assert 0 <= chapter.share_named(model, (2, 4), 40, 30, 1, p, prefix) <= 1

    def test_orders_are_told_apart(self):
        found = {(4, 64): 1.0, (64, 4): 0.5, (16, 64): 0.8, (64, 16): 0.1}
        assert chapter.by_order(found, tuple(found)) == (pytest.approx(0.9), pytest.approx(0.3))

    def test_the_size_of_a_state(self):
        layer = chapter.LinearAttention(12, 3, 5)
        _, state = layer(torch.randn(1, 7, 12))
        assert state[0].numel() == chapter.state_size(5, 12, 3)

    def test_a_single_rate_is_not_tried(self):
        assert chapter.best_rate((0.1,), lambda lr: 1 / 0) == 0.1
        assert chapter.best_rate((0.1, 0.2, 0.3), lambda lr: -abs(lr - 0.2)) == 0.2


class TestDocuments:
    @pytest.mark.parametrize("p", [1, 2])
    def test_pages_hold_the_document_and_the_answer(self, p):
        documents = table_documents(6, torch.Generator().manual_seed(0), rows=3, source="movies")
        x, real, asked = chapter.pages(documents, p)
        for row, is_real, is_asked, d in zip(x, real, asked, documents, strict=True):
            read = lambda mask: "".join(chapter.SYMBOLS[i] for i in row[mask])  # noqa: B023, E731
            assert read(is_asked) == d.answer + "\n"
            assert read(is_real) == "\n".join(p * [d.text + d.question]) + d.answer + "\n"
            assert (row[~is_real] == 0).all()

    def test_the_padding_carries_no_loss(self):
        torch.manual_seed(0)
        model = chapter.Based(len(chapter.SYMBOLS), ["linear"], 8, 2, 2)
        x, real, asked = chapter.pages(table_documents(4, torch.Generator().manual_seed(1)), 1)
        other = torch.where(real, x, 5)
        assert (~real).any() and chapter.page_loss(model, (x, real, asked)).item() == pytest.approx(
            chapter.page_loss(model, (other, real, asked)).item()
        )

    def test_an_answer_counts_only_if_it_is_whole(self):
        documents = table_documents(5, torch.Generator().manual_seed(2))
        x, _, asked = chapter.pages(documents, 2)

        class Reciting(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.nothing, self.wrong = torch.nn.Parameter(torch.zeros(1)), 0

            def forward(self, seen):
                following = x[:, 1:].clone()
                for b in range(self.wrong):  # the last character of so many answers
                    following[b, asked[b, 1:].nonzero()[-1]] = 3
                return F.one_hot(following, len(chapter.SYMBOLS)).float()

        model = Reciting()
        assert chapter.share_answered(model, documents, 2) == 1
        model.wrong = 2
        assert chapter.share_answered(model, documents, 2) == pytest.approx(0.6)


class TestRecipe:
    def test_a_shared_encoder_is_one_with_equal_weights(self):
        torch.manual_seed(0)
        shared, own = chapter.SharedPrefix(8, 2, 3), chapter.LinearAttention(8, 2, 3, prefix=True)
        own.load_state_dict(shared.state_dict() | {
            "prefix_key.weight": shared.key.weight, "prefix_value.weight": shared.value.weight})  # fmt: skip
        x = torch.randn(2, 12, 8)
        torch.testing.assert_close(shared(x, M=7)[0], own(x, M=7)[0])
        count = lambda layer: sum(p.numel() for p in layer.parameters())  # noqa: E731
        assert count(shared) == count(chapter.LinearAttention(8, 2, 3))

    @pytest.mark.parametrize("n", [0, 1, 9])
    def test_left_padding_is_tokens_with_zero_keys_and_values(self, n):
        torch.manual_seed(0)
        layer = chapter.LeftPadded(8, 2, 3, prefix=True).double()
        x, layer.padding = torch.randn(2, 12, 8, dtype=torch.float64), n
        q, k, v, ke, ve = (layer.split(f(x)) for f in (layer.query, layer.key, layer.value, layer.prefix_key,
                                                       layer.prefix_value))  # fmt: skip
        filled = lambda t: F.pad(t, (0, 0, n, 0))  # noqa: E731
        M = 7
        start = chapter.linear_attention_state(
            filled(ke[:, :, :M]), filled(ve[:, :, :M]), features="taylor", normalize=True
        )
        y, _ = linear_attention(filled(q), filled(k), filled(v), start, features="taylor", normalize=True)
        want = layer.leave(y[:, :, n:].transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, M=M)[0], want)
        plain = chapter.LinearAttention(8, 2, 3, prefix=True).double()
        plain.load_state_dict(layer.state_dict())
        assert torch.allclose(plain(x, M=M)[0], layer(x, M=M)[0]) == (n == 0)

    def test_dialogues(self):
        x, y = torch.tensor([[5, 50, 6, 60, 99, 6, 5, 6]]), torch.tensor([[-100] * 5 + [60, 50, 60]])
        assert chapter.dialogue(x, y, 5).tolist() == [[5, 50, 6, 60, 99, 6, 60, 5, 50, 6, 60]]

    @pytest.mark.parametrize("fill", [1, 4])
    def test_replies_are_scored_where_queries_stand(self, fill):
        model = Answering(chapter.KEYS + chapter.VALUES + 2)
        assert chapter.share_replied(model, 4, 3, 10, 5, fill) == 1


def keeps_a(a, b, memory):
    """The listener with one reading."""
    for element in a:
        memory.add(element)
    return [element for element in b if element in memory]


def drops_late(a, b, memory):
    size_a, size_b = sum(1 for _ in a), 0
    for element in b:
        size_b += 1
        memory.add(element)
        if size_b > size_a:
            memory.clear()
    if size_b <= size_a:
        return [element for element in a if element in memory]
    memory.clear()
    for element in a:
        memory.add(element)
    return [element for element in b if element in memory]


def divided(*arguments):
    return chapter.solve_mlm_ntp_loss(*arguments) / sum(arguments[-2:])


def one_early(logits, tokens, M, hidden, w1, w2):
    ahead = F.cross_entropy(logits[:, M - 1 : -1].flatten(0, 1), tokens[:, M:].flatten())
    return w1 * ahead + w2 * F.cross_entropy(logits[hidden], tokens[hidden])


def two_averages(q, k, v, ke, ve):
    weights = q @ ke.mT
    return (chapter.linear_attention_square(q, k, v) + weights @ ve / weights.sum(-1, keepdim=True)) / 2


def without_root_2(x):
    full, f = chapter.taylor_map(x), x.shape[-1]
    i, j = torch.triu_indices(f, f)
    return torch.cat([full[..., : 1 + f], full[..., 1 + f :].unflatten(-1, (f, f))[..., i, j]], dim=-1)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("check_jrt_prompt", lambda c, q, p, s: p * [*c, *q, s]),
        ("check_jrt_prompt", lambda c, q, p, s: [*(p * c), *q]),
        ("check_taylor_compact", without_root_2),
        ("check_taylor_compact", chapter.taylor_map),
        ("check_pla", two_averages),
        ("check_pla", lambda q, k, v, ke, ve: chapter.linear_attention_square(q, k, v)),
        ("check_two_pass", keeps_a),
        ("check_two_pass", drops_late),
        ("check_mlm_ntp_loss", divided),
        ("check_mlm_ntp_loss", one_early),
    ],
)
def test_checks_refuse_plausible_mistakes(check, answer):
    assert getattr(chapter, check).verdict(answer).startswith("not yet")
