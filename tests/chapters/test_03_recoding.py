"""Chapter 03: signals, closed forms, the recoding step, and exercise checks that tell right from wrong."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.notebooks import load_definitions

chapter = load_definitions("03-recoding")
signals = pytest.mark.parametrize("signal", chapter.SIGNALS)
V, H = 13, 6


def make(signal=None, layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return chapter.RecodingLM(V, H, layers, decoders=3 if signal == "ensemble" else 1, signal=signal, **options)


def words(B=3, T=7, seed=0):
    return torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(seed))


class TestSignals:
    @settings(max_examples=30, deadline=None)
    @given(K=st.integers(1, 5), B=st.integers(1, 4), size=st.floats(0.1, 30.0), seed=st.integers(0, 99))
    def test_closed_errors_are_the_gradients(self, K, B, size, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = (size * torch.randn(K, B, V, generator=generator)).double().requires_grad_()
        target = torch.randint(V, (B,), generator=generator)
        pairs = [
            (chapter.mixture_entropy(logits), chapter.mixture_error(logits)),
            (chapter.surprisal(logits[0], target), chapter.surprisal_error(logits[0], target)),
            (chapter.code_perplexity(logits[0], target), chapter.code_error(logits[0], target)),
        ]
        for delta, error in pairs:
            (want,) = torch.autograd.grad(delta.sum(), logits, retain_graph=True)
            want = want if error.ndim == 3 else want[0]
            torch.testing.assert_close(error, want, rtol=1e-5, atol=1e-7)

    def test_entropy_is_that_of_torch_and_survives_certainty(self):
        logits = torch.randn(4, 5, V).double()
        mean = torch.distributions.Categorical(probs=logits.softmax(-1).mean(0))
        torch.testing.assert_close(chapter.mixture_entropy(logits), mean.entropy())
        certain = torch.tensor([[[500.0, 0.0, -500.0]]])
        assert chapter.mixture_entropy(certain).item() == pytest.approx(0, abs=1e-6)
        assert chapter.mixture_error(certain).isfinite().all()

    def test_descending_the_codes_signal_makes_rare_words_rarer(self):
        for p, rises in ((0.05, False), (0.3, False), (0.5, True), (0.9, True)):
            logits = torch.tensor([[p / (1 - p), 1.0]]).log()
            target = torch.tensor([0])
            moved = logits - 0.01 * chapter.code_error(logits, target)
            assert bool(moved.softmax(-1)[0, 0] > p) is rises
            honest = logits - 0.01 * chapter.surprisal_error(logits, target)
            assert honest.softmax(-1)[0, 0] > p


class TestModel:
    @signals
    @pytest.mark.parametrize("target", ["gold", "pred"])
    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_closed_form_is_autograd(self, signal, target, layers):
        model = make(signal, layers, alpha=0.5, target=target, dropout=0.3).double()
        x, y = words()
        state = [tuple(torch.randn(3, H).double() for _ in "hc") for _ in range(layers)]
        keep = chapter.dropout_mask(model, 3)
        results = []
        for model.naive in (False, True):
            torch.manual_seed(1)  # the same masks
            _, after, _ = chapter.recoding_step(model, model.embedding(x[:, 0]), state, y[:, 0], keep)
            results.append([a for pair in after for a in pair])
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)

    @signals
    def test_without_a_step_nothing_changes(self, signal):
        model, (x, y) = make(signal).eval(), words()
        decoders = len(model.W)
        plain = chapter.RecodingLM(V, H, 2, decoders=decoders).eval()
        plain.load_state_dict(model.state_dict())
        want = plain(x, watch=lambda *step: None)[0]
        for choice in (dict(alpha=0.0), dict(rule="zero", alpha=3.0)):
            assert torch.equal(model.recoder(signal, **choice)(x, targets=y)[0], want)
        torch.testing.assert_close(plain(x)[0], want)  # word by word and in one kernel
        assert not torch.allclose(model.recoder(signal, alpha=1.0)(x, targets=y)[0], want)

    @signals
    def test_rows_do_not_touch_each_other(self, signal):
        model, (x, y) = make(signal, alpha=0.7, samples=2, rate=0.0), words(B=4)
        together, state = model(x, targets=y)
        alone, own = model(x[2:3], targets=y[2:3])
        torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[0][1][2:3], own[0][1], rtol=1e-5, atol=1e-6)
        other = x.clone()
        other[0] = (other[0] + 1) % V
        torch.testing.assert_close(model(other, targets=y)[0][1:], together[1:], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("redecode", [False, True])
    def test_a_target_acts_on_nothing_before_it(self, redecode):
        model, (x, y) = make("surprisal", redecode=redecode, allow_leak=True, alpha=0.5), words()
        other = y.clone()
        other[:, 3] = (other[:, 3] + 1) % V
        moved = (model(x, targets=y)[0] != model(x, targets=other)[0]).any(-1).any(0)
        assert moved.nonzero().flatten().tolist() == list(range(3 if redecode else 4, 7))

    @signals
    @pytest.mark.parametrize("naive", [False, True])
    def test_the_correction_has_no_graph_and_the_state_keeps_its_own(self, signal, naive):
        model, (x, y) = make(signal, alpha=0.5, samples=3), words()
        model.naive = naive
        state = [tuple(torch.randn(3, H, requires_grad=True) for _ in "hc") for _ in range(2)]
        before, notes = chapter.stack_step(model.lstm.layers, model.embedding(x[:, 0]), state)
        view = chapter.make_view(model, before[-1][0], y[:, 0])
        pairs = chapter.recoding_gradients(model, before, notes, view)
        assert not any(g.requires_grad for pair in pairs for g in pair)
        _, after, _ = chapter.recoding_step(model, model.embedding(x[:, 0]), state, y[:, 0])
        # with G a constant, the correction is the identity for gradients
        got = torch.autograd.grad(sum(a.sum() for pair in after for a in pair), state[0][0], retain_graph=True)
        want = torch.autograd.grad(sum(a.sum() for pair in before for a in pair), state[0][0])
        torch.testing.assert_close(got, want)

    def test_memory_of_backpropagation_grows_by_the_state_alone(self):
        def saved(model, T):
            sizes = []
            x, y = words(T=T)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
                model(x, targets=y)
            return sum(sizes)

        plain, recoding = make(), make("entropy", alpha=0.5)
        for T in (5, 10, 20):
            by_steps = saved(recoding.recoder("entropy", rule="zero"), T)
            assert saved(recoding.recoder("entropy", alpha=0.5), T) <= by_steps  # G adds nothing
        assert saved(recoding, 40) - saved(recoding, 20) == 2 * (saved(recoding, 20) - saved(recoding, 10))
        assert saved(plain, 5) > 0

    def test_monte_carlo_masks_are_new_at_every_word_and_in_evaluation(self):
        model, (x, _) = make("mc_dropout", alpha=0.5, samples=4, rate=0.5, dropout=0.5).eval(), words(T=6)
        masks = []
        model(x, watch=lambda t, before, after, view: masks.append(view[0]))
        assert all(m.shape == (4, 3, H) and set(m.unique().tolist()) == {0.0, 2.0} for m in masks)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
        assert chapter.dropout_mask(model, 3, 6) == 1.0  # no ordinary dropout in evaluation
        assert set(chapter.dropout_mask(model.train(), 3, 6).unique().tolist()) == {0.0, 2.0}

    @pytest.mark.parametrize("rule", ["learned", "mlp"])
    def test_trained_step_sizes_are_positive_and_trained(self, rule):
        model, (x, y) = make("entropy", rule=rule, widths=(5, 4)), words()
        sizes = [size(torch.randn(3, H)) for pair in model.step_sizes for size in pair]
        assert len(sizes) == 4 and all((s > 0).all() for s in sizes)
        assert rule == "learned" or sizes[0].shape == (3, 1)
        F.cross_entropy(model(x, targets=y)[0].flatten(0, 1), y.flatten()).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.step_sizes[-1][0].parameters())

    def test_nan_gradients_are_zeroed_and_counted(self):
        model = make("entropy", alpha=0.5)
        state = [tuple(torch.randn(3, H) for _ in "hc") for _ in range(2)]
        notes = [tuple(torch.rand(3, H) for _ in range(5)) for _ in range(2)]
        notes[1][3][0, 0] = float("nan")  # the top layer's output gate
        view = chapter.make_view(model, state[-1][0], None)
        pairs = chapter.recoding_gradients(model, state, notes, view)
        assert model.nan_count > 0 and not any(g.isnan().any() for pair in pairs for g in pair)

    def test_errors(self):
        for wrong in (
            dict(signal="doubt"),
            dict(signal="entropy", rule="best"),
            dict(signal="surprisal", target="next"),
        ):
            with pytest.raises(ValueError, match="expected .* to be one of .*, got"):
                make().recoder(**wrong)
        for signal in ("surprisal", "code_ppl"):
            with pytest.raises(ValueError, match="expected redecode=False with the gold target"):
                make().recoder(signal, redecode=True)
            assert make().recoder(signal, redecode=True, allow_leak=True).redecode
            assert make().recoder(signal, target="pred").redecode  # the guess leaks nothing
        with pytest.raises(ValueError, match="expected targets"):
            make("surprisal")(words()[0])

    def test_anchors_pull_and_are_not_where_the_ensemble_starts(self):
        model, (x, y) = make("ensemble"), words()
        loss = chapter.anchored_loss(model, tokens=10)
        model.zero_grad()
        (loss(model, (x, y), None)[0] - chapter.lm_loss(model, (x, y), None)[0]).backward()
        norm = model.W.grad.flatten(1).norm(dim=1)
        torch.testing.assert_close(norm, torch.full((3,), 0.1 / 0.286 / 10 / 3), rtol=1e-3, atol=1e-6)


WRONG = {
    "check_surprisal": lambda logits, target: -torch.log(logits.softmax(-1)).mean(-1),
    "check_entropy_grad": lambda logits: logits.softmax(-1) * logits.log_softmax(-1),
    "check_recode": lambda h, G, alpha: h - alpha[:, None] * G,
    "check_mc_entropy": lambda h, W, b, masks: chapter.mixture_entropy(((h * masks) @ W.T + b).mean(0, keepdim=True)),
}


@pytest.mark.parametrize("name", [*WRONG, "check_two_careful_steps"])
def test_exercise_checks_tell_right_from_wrong(name):
    def plain_steps(h, delta, alpha):
        for _ in range(2):
            h = h.detach().requires_grad_()
            h = h - alpha * torch.autograd.grad(delta(h).sum(), h)[0]
        return h.detach()

    with pytest.raises(AssertionError):
        getattr(chapter, name).verify(WRONG.get(name, plain_steps))
