"""Chapter 06: no leakage, fast forms equal slow ones, both decoders, the metrics, and exercise checks against wrong answers."""

import random
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from seqarch.data.digit_dialog import DialogWords, digit_dialogs
from seqarch.data.retrieval import retrieval_metrics
from tests.notebooks import load_definitions

chapter = load_definitions("06-visual-dialog")
REGION = 5  # numbers that describe a region of a picture


def looking(blind, sources, hops):
    """What makes a blind encoder and hops of attention over regions after it."""

    def make(ids, words, image, sources_, **options):
        return chapter.Looking(blind(ids, words, image, sources, **options), REGION, hops)

    return make


def coattention(ids, words, image, sources, **options):
    return chapter.HieCoAtt(ids, words, REGION, "QI", **options)


KINDS = {
    "LF": (chapter.LateFusion, {}),
    "HRE": (chapter.HRE, {}),
    "HREA": (chapter.HRE, {"attend": True}),
    "MN": (chapter.MemoryNetwork, {}),
    "LF-att": (looking(chapter.LateFusion, "QH", 1), {}),
    "MN-att": (looking(chapter.MemoryNetwork, "QH", 1), {}),
}
every_encoder = pytest.mark.parametrize("kind", list(KINDS))
KINDS |= {"SAN": (looking(chapter.LateFusion, "Q", 2), {}), "HieCoAtt": (coattention, {})}  # without history
every_machine = pytest.mark.parametrize("kind", KINDS)
every_depth = pytest.mark.parametrize("layers", [1, 2])


def copy(dialogs):
    """Dialogs whose words can be changed."""
    other = digit_dialogs(6, seed=0)
    other.captions[:] = list(dialogs.captions)
    for mine, theirs in ((other.questions, dialogs.questions), (other.answers, dialogs.answers)):
        for row, source in zip(mine, theirs, strict=True):
            row[:] = list(source)
    return other


class World:
    """Small dialogs and variants of them, in one vocabulary and one set of tables."""

    def __init__(self, *variants):
        torch.manual_seed(0)
        self.dialogs = [digit_dialogs(6, seed=0), *variants]
        said = [s for d in self.dialogs for rows in (d.questions, d.answers) for row in rows for s in row]
        self.words = DialogWords([*said, *(c for d in self.dialogs for c in d.captions)], least=1)
        self.texts = {
            "question": chapter.Texts((q for d in self.dialogs for row in d.questions for q in row), self.words),
            "fact": chapter.Texts((f for d in self.dialogs for row in chapter.facts_of(d) for f in row), self.words),
            "answer": chapter.Texts((a for d in self.dialogs for row in d.answers for a in row), self.words),
        }
        self.batches = [chapter.dialog_tensors(d, self.texts, self.words) for d in self.dialogs]
        image, regions, U = torch.randn(6, 9), torch.randn(6, 4, REGION), len(self.texts["answer"].list)
        for b in self.batches:
            b["image"], b["regions"] = image, regions
            b["candidates"] = torch.rand(6, 10, U).argsort(-1)[..., :7]

    def encoder(self, kind, sources="QIH", **options):
        torch.manual_seed(1)
        make, more = KINDS[kind]
        ids = {name: t.ids for name, t in self.texts.items()}
        return make(ids, len(self.words), 9, sources, E=8, H=12, **more, **options).eval()


def vectors(encoder, batch):
    with torch.no_grad():
        return encoder(batch)[0]


def reading(encoder):
    """The part of an encoder that reads: of one that looks, the blind one."""
    return getattr(encoder, "blind", encoder)


def in_double(batch):
    return batch | {name: batch[name].double() for name in ("image", "regions")}


def rows(batch, chosen):
    return {name: value[chosen] for name, value in batch.items()}


# --- what may be known when -----------------------------------------------------------------------------------------


@every_encoder
@every_depth
@pytest.mark.parametrize("t", [0, 3, 8])
def test_nothing_leaks_from_the_answer_or_from_later_rounds(kind, layers, t):
    changed = copy(digit_dialogs(6, seed=0))
    for i in range(6):
        changed.answers[i][t:] = ["yes two" if a != "yes two" else "no" for a in changed.answers[i][t:]]
        changed.questions[i][t + 1 :] = ["is there a nine ?"] * (9 - t)
    world = World(changed)
    encoder = world.encoder(kind, layers=layers).double()
    e, other = (vectors(encoder, in_double(b)) for b in world.batches)
    # other texts in the same products may change the order of a sum: exact up to the rounding of float64
    torch.testing.assert_close(e[:, : t + 1], other[:, : t + 1], rtol=0, atol=1e-13)
    assert (e - other)[:, t + 1 :].abs().amax(-1).min() > 1e-4


@every_encoder
def test_no_gradient_from_later_facts(kind):
    world = World()
    encoder = world.encoder(kind)
    facts = rows(world.batches[0], slice(0, 1))
    e = encoder(facts)[0]
    (gradient,) = torch.autograd.grad(e[0, 0].sum(), reading(encoder).embed.weight)
    known = set(world.texts["question"].ids[facts["question"][0, 0]].tolist())
    known |= set(world.texts["fact"].ids[facts["fact"][0, 0]].tolist()) | {chapter.END}
    assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) <= known


@every_encoder
def test_the_caption_reaches_every_round(kind):
    changed = copy(digit_dialogs(6, seed=0))
    changed.captions[:] = ["a blue nine and a thin eight with two other digits"] * 6
    world = World(changed)
    encoder = world.encoder(kind).double()
    e, other = (vectors(encoder, in_double(b)) for b in world.batches)
    assert (e - other).abs().amax(-1).min() > 0


@pytest.mark.parametrize(
    "kind, sources, columns",
    [
        ("LF", "Q", ("image", "string", "fact")),
        ("LF", "QI", ("string", "fact")),
        ("LF", "QH", ("image",)),
        ("MN", "QH", ("image",)),
        ("LF-att", "QH", ("image",)),
        ("SAN", "QI", ("image", "string", "fact")),
        ("HieCoAtt", "QI", ("image", "string", "fact")),
    ],
)
def test_an_ablation_does_not_see_what_it_must_not(kind, sources, columns):
    world = World()
    encoder, b = world.encoder(kind, sources), world.batches[0]
    other = b | {c: b[c].flip(0) for c in columns} | ({"ends": b["ends"].flip(0)} if "string" in columns else {})
    assert torch.equal(vectors(encoder, b), vectors(encoder, other))


def test_facts_and_strings():
    world = World()
    dialogs, b = world.dialogs[0], world.batches[0]
    for i in range(6):
        for t in range(10):
            want = [dialogs.captions[i]]
            want += [f"{q} {a}" for q, a in zip(dialogs.questions[i][:t], dialogs.answers[i][:t], strict=True)]
            assert [world.texts["fact"].list[r] for r in b["fact"][i, : t + 1]] == want
            ids = b["string"][i, : b["ends"][i, t] + 1]
            assert world.words.text(w for w in ids if w != chapter.END) == " ".join(want)
            assert ids[-1] == chapter.END


# --- fast is slow ---------------------------------------------------------------------------------------------------


@every_depth
def test_late_fusion_is_its_loop(layers):
    world = World()
    encoder = world.encoder("LF", layers=layers)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(world.batches[0])[0], chapter.one_by_one(encoder, world.batches[0]), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["HRE", "HREA"])
def test_hre_round_by_round(kind):
    world = World()
    encoder, b = world.encoder(kind), world.batches[0]
    with torch.no_grad():
        q, f = encoder.questions(b)[0], encoder.read(encoder.read_fact, encoder.fact, b["fact"])[0]
        state, e = None, []
        for t in range(10):
            weights = (f[:, : t + 1] @ encoder.w.weight[0]).softmax(-1)
            seen = torch.einsum("bj,bjh->bh", weights, f[:, : t + 1]) if kind == "HREA" else f[:, t]
            out, state = encoder.dialog.step(torch.cat([q[:, t], seen], -1), state)
            e.append(out)
        torch.testing.assert_close(encoder(b)[0], torch.stack(e, 1), rtol=0, atol=1e-6)


def test_memory_network_round_by_round():
    world = World()
    encoder, b = world.encoder("MN"), world.batches[0]
    with torch.no_grad():
        q, f, _ = encoder.inputs(b)
        for t in range(10):
            alpha = torch.einsum("bh,bjh->bj", q[:, t], f[:, : t + 1]).softmax(-1)
            m = torch.einsum("bj,bjh->bh", alpha, f[:, : t + 1])
            torch.testing.assert_close(encoder(b)[0][:, t], encoder.answer_vector(m, q[:, t]), rtol=0, atol=1e-6)


@every_machine
@every_depth
def test_the_company_in_a_batch_does_not_matter(kind, layers):
    world = World()
    encoder, b = world.encoder(kind, layers=layers), world.batches[0]
    together = vectors(encoder, b)
    for i in range(6):
        torch.testing.assert_close(vectors(encoder, rows(b, slice(i, i + 1)))[0], together[i], rtol=0, atol=1e-5)
    many = torch.arange(32) % 6
    torch.testing.assert_close(vectors(encoder, rows(b, many)), together[many], rtol=0, atol=1e-5)


@every_machine
def test_left_padding_does_not_matter(kind):
    world = World()
    encoder, b = world.encoder(kind), world.batches[0]
    before = vectors(encoder, b)
    for name in ("question", "fact"):
        setattr(reading(encoder), name, F.pad(getattr(reading(encoder), name), (5, 0)))
    padded = b | dict(string=F.pad(b["string"], (4, 0)), ends=b["ends"] + 4)
    torch.testing.assert_close(vectors(encoder, padded), before, rtol=0, atol=1e-6)


@every_depth
def test_a_reader_is_not_touched_by_padding(layers):
    reader = chapter.Reader(4, 3, layers).eval()
    x, real = torch.randn(5, 6, 4), torch.ones(5, 6, dtype=torch.bool)
    garbage = torch.cat([1e3 * torch.randn(5, 3, 4), x], 1)
    for one, other in zip(reader(x, real), reader(garbage, F.pad(real, (3, 0))), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_hrea_ignores_the_question_and_the_memory_network_does_not():
    world = World()
    b = world.batches[0]
    for kind, same in (("HREA", True), ("MN", False)):
        encoder = world.encoder(kind)
        vectors(encoder, b)
        before = encoder.alpha
        vectors(encoder, b | {"question": b["question"].flip(0)})
        assert torch.allclose(before, encoder.alpha, rtol=0, atol=1e-6) == same
        assert (before.triu(1) == 0).all()
        torch.testing.assert_close(before.sum(-1), torch.ones(6, 10))


def test_a_logit_of_zero_is_not_masked_and_the_memory_can_be_short():
    weights = chapter.masked_softmax(torch.zeros(4, 4))
    torch.testing.assert_close(weights, torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None])
    torch.testing.assert_close(chapter.masked_softmax(torch.zeros(4, 4), 10), weights)
    caption = torch.zeros(4, 4)
    caption[:, 0] = 1
    torch.testing.assert_close(chapter.masked_softmax(torch.randn(4, 4), 0), caption)
    seen = chapter.masked_softmax(torch.zeros(4, 4), 2) > 0
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


# --- looking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LF-att", "MN-att", "SAN"])
def test_hops_region_by_region(kind):
    world = World()
    encoder, b = world.encoder(kind), world.batches[0]
    with torch.no_grad():
        e, v = encoder(b)[0], torch.tanh(encoder.W_r(b["regions"]))
        for i in range(6):
            for t in (0, 9):
                u = encoder.blind(b)[0][i, t]
                for hop in encoder.hops:
                    g = torch.stack([torch.tanh(hop.W_v.weight @ x + hop.W_u(u)) for x in v[i]])
                    p = (g @ hop.w.weight[0]).softmax(0)
                    u = u + p @ v[i]
                torch.testing.assert_close(encoder.p[i, t], p, rtol=0, atol=1e-6)
                torch.testing.assert_close(e[i, t], torch.tanh(encoder.W_e(u)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["LF-att", "MN-att", "SAN", "HieCoAtt"])
def test_regions_are_a_set_and_the_right_picture_is_looked_at(kind):
    world = World()
    encoder, b = world.encoder(kind), world.batches[0]
    e, order = vectors(encoder, b), torch.randperm(4)
    torch.testing.assert_close(vectors(encoder, b | {"regions": b["regions"][:, order]}), e, rtol=0, atol=1e-5)
    other = b["regions"].clone()
    other[2, 3] += 1
    changed = (vectors(encoder, b | {"regions": other}) - e).abs().amax((1, 2))
    assert changed[2] > 1e-4 and torch.equal(changed.nonzero()[:, 0], torch.tensor([2]))


def test_where_one_looks_depends_on_the_question_and_what_is_known():
    world = World()
    b = world.batches[0]
    for kind, history in (("LF-att", True), ("MN-att", True), ("SAN", False)):
        encoder = world.encoder(kind)
        vectors(encoder, b)
        before = encoder.p
        torch.testing.assert_close(before.sum(-1), torch.ones(6, 10))
        vectors(encoder, b | {"question": b["question"].flip(0)})
        assert not torch.allclose(before, encoder.p, rtol=0, atol=1e-5)
        vectors(encoder, b | {name: b[name].flip(0) for name in ("fact", "string", "ends")})
        assert torch.allclose(before, encoder.p, rtol=0, atol=1e-6) != history


def test_coattention_word_by_word():
    torch.manual_seed(0)
    level = chapter.CoAttention(6).double()
    Q, V = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    real = torch.tensor([[False, True, True, True], [False, False, False, True]])
    for n in range(2):
        q, v = Q[n][real[n]], V[n]
        A = torch.tanh(torch.einsum("th,hk,mk->tm", q, level.W_b.weight.T, v))
        to_v = torch.einsum("tm,th,hk->mk", A, q, level.W_q.weight.T)
        to_q = torch.einsum("tm,mh,hk->tk", A, v, level.W_v.weight.T)
        a_v = (torch.tanh(v @ level.W_v.weight.T + to_v) @ level.w_v.weight[0]).softmax(0)
        a_q = (torch.tanh(q @ level.W_q.weight.T + to_q) @ level.w_q.weight[0]).softmax(0)
        torch.testing.assert_close(level(Q, V, real)[n], a_v @ v + a_q @ q)


def test_phrases_are_the_strongest_of_three_windows():
    world = World()
    encoder = world.encoder("HieCoAtt")
    ids = encoder.question[:5]
    with torch.no_grad():
        (word, phrase, sentence), real = encoder.views(ids)
        for n in range(5):
            w = word[n][real[n]]
            for t in range(len(w)):
                windows = []
                for s, conv in enumerate(encoder.phrases, 1):
                    rows_ = F.pad(w[t : t + s], (0, 0, 0, s - len(w[t : t + s])))
                    windows.append(torch.tanh(torch.einsum("hks,sk->h", conv.weight, rows_) + conv.bias))
                torch.testing.assert_close(phrase[n][real[n]][t], torch.stack(windows).amax(0), rtol=0, atol=1e-6)
        for view in (word, phrase, sentence):
            assert (view[~real] == 0).all()


@pytest.mark.parametrize("grid", [2, 3])
def test_regions_come_row_by_row_with_their_places(grid):
    torch.manual_seed(0)
    eye, side = chapter.Eye().eval(), 2 * grid
    blank, marked = torch.zeros(1, 3, 8 * grid, 8 * grid), torch.zeros(grid * grid, 3, 8 * grid, 8 * grid)
    for cell in range(grid * grid):
        row, column = divmod(cell, grid)
        marked[cell, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.rand(3, 8, 8)
    v, nothing = chapter.region_features(eye, marked), chapter.region_features(eye, blank)
    assert v.shape == (grid * grid, side * side, 32)
    different = (v != nothing).any(-1).view(grid * grid, side, side)
    for cell in range(grid * grid):
        row, column = divmod(cell, grid)
        want = torch.zeros(side, side, dtype=torch.bool)
        want[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
        assert torch.equal(different[cell], want)
    placed = chapter.with_places(v, side)
    assert torch.equal(placed[..., :32], v)
    x, y = placed[0, :, 32:].view(side, side, 2).unbind(-1)
    assert (x.diff(dim=1) > 0).all() and (x.diff(dim=0) == 0).all() and x.min() == -2 and x.max() == 2
    assert torch.equal(y, x.T)


def test_right_align_cuts_and_counts():
    assert chapter.right_align([[5, 6], [7]]).tolist() == [[5, 6], [0, 7]]
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 2 words and were cut"):
        assert chapter.right_align([[5, 6, 7], [8]], 2).tolist() == [[5, 6], [0, 8]]
    with pytest.warns(UserWarning, match="2 of 2 texts"):
        assert chapter.right_align([[5, 6, 7], [8, 9]], 1, keep="last").tolist() == [[7], [9]]


# --- decoders -------------------------------------------------------------------------------------------------------


@every_machine
def test_reading_options_once_is_reading_them_all(kind):
    world = World()
    model, b = chapter.Discriminative(world.encoder(kind), 8, 12).eval(), world.batches[0]
    target = torch.randint(7, (60,))
    results = []
    for run in (model, model.naive):
        model.zero_grad()
        scores = run(b)
        F.cross_entropy(scores.flatten(0, 1), target).backward()
        results.append([scores.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_order_of_candidates_moves_scores_and_nothing_else():
    world = World()
    b, order = world.batches[0], torch.randperm(7)
    other = b | {"candidates": b["candidates"][..., order]}
    for model in (chapter.Discriminative(world.encoder("MN"), 8, 12), chapter.Generative(world.encoder("MN"), 8, 12)):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(other), model(b)[..., order])


@pytest.mark.parametrize("kind", ["LF", "MN"])
@every_depth
def test_a_likelihood_is_the_product_of_its_steps(kind, layers):
    world = World()
    encoder = world.encoder(kind, layers=layers)
    model, b = chapter.Generative(encoder, 8, 12, layers).eval(), rows(world.batches[0], slice(0, 1))
    with torch.no_grad():
        scores, start = model(b), model.start(b)
        for t in (0, 6):
            for c in range(7):
                row, state = encoder.answer[b["candidates"][0, t, c]], tuple(s[t : t + 1] for s in start)
                word, product = torch.tensor([chapter.START]), 1.0
                for following in [*row[row != chapter.PAD].tolist(), chapter.END]:
                    logits, state = model.step(word, state)
                    product *= logits.softmax(-1)[0, following].item()
                    word = torch.tensor([following])
                assert scores[0, t, c].exp().item() == pytest.approx(product, rel=1e-3)


@every_depth
def test_the_state_from_which_an_answer_starts(layers):
    world = World()
    encoder = world.encoder("LF", layers=layers)
    model, b = chapter.Generative(encoder, 8, 12, layers).eval(), world.batches[0]
    with torch.no_grad():
        (h, c), (e, (hq, cq)) = model.start(b), encoder(b)
    assert h.shape == c.shape == (60, layers, 12)
    assert torch.equal(h[:, -1], e.flatten(0, 1)) and torch.equal(c, cq.flatten(0, 1))
    assert torch.equal(h[:, :-1], hq.flatten(0, 1)[:, :-1])


@pytest.mark.parametrize("kind", ["LF", "MN"])  # HRE's state over rounds comes from questions that a chat forgets
@every_depth
def test_a_chat_reads_what_the_batch_reads(kind, layers):
    world = World()
    torch.manual_seed(3)
    model = chapter.Generative(world.encoder(kind, layers=layers), 8, 12, layers).eval()
    b, dialogs = rows(world.batches[0], slice(0, 1)), world.dialogs[0]
    chat = chapter.Chat(model, world.words, b["image"][0], dialogs.captions[0])
    for t in range(10):
        with torch.no_grad():
            want = tuple(s[t : t + 1] for s in model.start(b))
        best = chapter.beam_search(model.step, want, chapter.START, chapter.END, 5, 8, length_penalty=0.0)[0][0]
        assert chat.ask(dialogs.questions[0][t]) == world.words.text(best.tokens)
        chat.facts[-1] = f"{dialogs.questions[0][t]} {dialogs.answers[0][t]}"


# --- candidates and metrics -----------------------------------------------------------------------------------------


def test_plausible_answers_are_those_of_the_nearest_questions():
    distance = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [5.0, 4.0, 0.0]])
    question, answer = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([3, 3, 1, 0, 1, 2])
    plausible = chapter.plausible_answers(question, answer, distance, 5, 3)
    assert plausible.tolist() == [[3, 1, 0], [0, 1, 3], [2, 0, 1]] or plausible[0].tolist() == [3, 1, 0]
    assert plausible[2, 0] == 2 and 4 not in plausible


def test_word_vectors_know_who_keeps_company_with_whom():
    words = DialogWords(["the red cat sat", "the blue cat sat", "one two three"] * 5)
    v = F.normalize(
        chapter.word_vectors(["the red cat sat", "the blue cat sat", "one two three"] * 5, words, dim=6), dim=1
    )
    red, blue, two = (words.index[w] for w in ("red", "blue", "two"))
    assert v[red] @ v[blue] > 0.9 > v[red] @ v[two]


@pytest.mark.parametrize("C, expected", [(50, 0.0900), (100, 0.0519)])
def test_guessing_has_the_expected_reciprocal_rank(C, expected):
    torch.manual_seed(0)
    drawn = retrieval_metrics(torch.rand(20_000, C), torch.arange(20_000) % C)
    collapsed = retrieval_metrics(torch.ones(3, C), torch.arange(3))
    assert drawn["mrr"] == pytest.approx(expected, abs=0.005)
    assert collapsed["mrr"] == pytest.approx(expected, abs=1e-4) and collapsed["mean_rank"] == (C + 1) / 2


def test_neighbours_answer_with_what_they_heard():
    known = dict(
        question=torch.tensor([[0, 1]]), answer=torch.tensor([[2, 0]]), image=torch.zeros(1, 3)
    )  # fmt: skip
    table = dict(question=torch.tensor([[1]]), image=torch.zeros(1, 3), candidates=torch.tensor([[[0, 1, 2]]]))
    distance, similarity = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(3)
    for images in (False, True):
        s = chapter.nearest_neighbour_scores(table, known, distance, similarity, k=1, first=1, images=images)
        assert s.tolist() == [[[1.0, 0.0, 0.0]]]


# --- the exercises: every check accepts its solution and refuses plausible wrong answers ---------------------------


def metrics_in_percent(ranks):
    return {k: v * 100 if k.startswith("r") else v for k, v in chapter.solve_rank_metrics(ranks).items()}


def metrics_from_zero(ranks):
    return chapter.solve_rank_metrics([r + 1 for r in ranks])


def metrics_inverse_of_the_mean(ranks):
    return chapter.solve_rank_metrics(ranks) | dict(mrr=len(ranks) / sum(ranks))


def align_nothing(ids, lengths):
    return ids


def align_reversed(ids, lengths):
    return ids.flip(1)


def align_all_alike(ids, lengths):
    return ids.roll(ids.shape[1] - int(lengths[0]), dims=1)


def rank_by_sorting(scores, target):
    return 1 + (scores.argsort(descending=True, stable=True) == target).nonzero()[0, 0].item()


def rank_optimist(scores, target):
    return 1 + (scores > scores[target]).sum().item()


def rank_counts_itself(scores, target):
    return 1 + (scores > scores[target]).sum().item() + (scores == scores[target]).sum().item() / 2


def attention_without_a_mask(q, f):
    weights = (q @ f.transpose(1, 2)).softmax(-1)
    return weights @ f, weights


def attention_masked_by_zeros(q, f):
    logits = (q @ f.transpose(1, 2)).tril()
    weights = logits.masked_fill(logits == 0, -torch.inf).nan_to_num(0.0).softmax(-1)
    return weights @ f, weights


def attention_masked_afterwards(q, f):
    weights = (q @ f.transpose(1, 2)).softmax(-1).tril()
    return weights @ f, weights


def attention_without_the_newest(q, f):
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(0)
    hidden[0, 0] = False
    weights = (q @ f.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights @ f, weights


def hrea_as_released():
    return chapter.solve_hrea()[0], chapter.hrea_weights


def hrea_tanh_of_the_parts():
    return chapter.solve_hrea()[0], lambda q, f, u, w: (torch.tanh(q @ u)[:, None] + torch.tanh(f @ w)).softmax(-1)


def hrea_always_ignores():
    return (lambda *a: True), chapter.solve_hrea()[1]


def hrea_over_questions():
    return chapter.solve_hrea()[0], lambda q, f, u, w: torch.tanh(q[:, None] * u + f[None] * w).sum(-1).softmax(0)


def candidates_unshuffled(question, corpus, rng):
    got = chapter.solve_build_candidates(question, corpus, rng)
    return [question[1], *(c for c in got if c != question[1])]


def candidates_all_random(question, corpus, rng):
    everything = sorted({a for _, a in corpus} - {question[1]})
    if len(everything) < 19:
        raise ValueError("expected more answers")
    got = [question[1], *rng.sample(everything, 19)]
    rng.shuffle(got)
    return got


def candidates_with_duplicates(question, corpus, rng):
    if len(corpus) < 20:
        raise ValueError("expected more answers")
    near = sorted(corpus, key=lambda p: -len(set(p[0].split()) & set(question[0].split())))
    got = [question[1], *(a for _, a in near[:19])]
    rng.shuffle(got)
    return got


def candidates_without_popular(question, corpus, rng):
    near = sorted(corpus, key=lambda p: -len(set(p[0].split()) & set(question[0].split())))
    got = [question[1], *dict.fromkeys(a for _, a in near if a != question[1])][:20]
    if len(got) < 20:
        raise ValueError("expected more answers")
    rng.shuffle(got)
    return got


def candidates_unchecked(question, corpus, rng):
    corpus = [*corpus, *((f"{k}", f"filler {k}") for k in range(20))] if len(corpus) < 20 else corpus
    return chapter.solve_build_candidates(question, corpus, rng)


EXERCISES = [
    ("check_rank_metrics", "solve_rank_metrics", [metrics_in_percent, metrics_from_zero, metrics_inverse_of_the_mean]),
    ("check_align_right", "solve_align_right", [align_nothing, align_reversed, align_all_alike]),
    ("check_expected_rank", "solve_expected_rank", [rank_by_sorting, rank_optimist, rank_counts_itself]),
    (
        "check_masked_attention",
        "solve_masked_attention",
        [
            attention_without_a_mask,
            attention_masked_by_zeros,
            attention_masked_afterwards,
            attention_without_the_newest,
        ],
    ),
    (
        "check_hrea",
        "solve_hrea",
        [hrea_as_released, hrea_tanh_of_the_parts, hrea_always_ignores, hrea_over_questions],
    ),
    (
        "check_build_candidates",
        "solve_build_candidates",
        [
            candidates_unshuffled,
            candidates_all_random,
            candidates_with_duplicates,
            candidates_without_popular,
            candidates_unchecked,
        ],
    ),
]


@pytest.mark.parametrize("check, solution", [(c, s) for c, s, _ in EXERCISES])
def test_solutions_pass(check, solution):
    assert getattr(chapter, check).verdict(getattr(chapter, solution)) == "correct"


@pytest.mark.parametrize("check, wrong", [(c, w) for c, _, wrongs in EXERCISES for w in wrongs])
def test_wrong_answers_are_refused(check, wrong):
    assert getattr(chapter, check).verdict(wrong).startswith("not yet: ")


def test_the_exercise_on_candidates_has_a_human_answer_that_nobody_else_gave():
    got = chapter.solve_build_candidates(("q", "new"), [(str(k), str(k)) for k in range(30)], random.Random(0))
    assert Counter(got)["new"] == 1 and len(got) == 20
