"""Chapter 02: masks, layers from graphs, and exercise checks that tell right from wrong."""

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from seqarch.data.reber import encode, is_reber
from seqarch.layers.rnn import GRU, LSTM, RNN
from tests.notebooks import load_definitions

chapter = load_definitions("02-recurrent-sparsity")
MODES = list(chapter.GATES)
modes = pytest.mark.parametrize("mode", MODES)


def holed(mode, D=5, H=6, seed=0, share=0.5):
    torch.manual_seed(seed)
    layer = chapter.MaskedRecurrentLayer(D, H, mode)
    layer.mask_i2h.bernoulli_(share)
    layer.mask_h2h.bernoulli_(share)
    return layer


class TestMaskedLayer:
    @modes
    def test_unmasked_it_is_the_layer_of_chapter_1_and_of_torch(self, mode):
        torch.manual_seed(0)
        layer, x = chapter.MaskedRecurrentLayer(5, 6, mode), torch.randn(3, 9, 5)
        kind = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}.get(mode)
        ours = RNN(5, 6, activation=kind) if kind else {"GRU": GRU, "LSTM": LSTM}[mode](5, 6)
        theirs = (
            nn.RNN(5, 6, nonlinearity=kind, batch_first=True)
            if kind
            else {"GRU": nn.GRU, "LSTM": nn.LSTM}[mode](5, 6, batch_first=True)
        )
        inner = ours.layers[0]
        with torch.no_grad():
            inner.w_x.copy_(layer.weight_ih)
            inner.w_h.copy_(layer.weight_hh)
            inner.b.copy_(layer.bias_ih + (0 if mode == "GRU" else layer.bias_hh))
            if mode == "GRU":
                inner.b_h.copy_(layer.bias_hh)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(theirs, f"{name}_l0").copy_(getattr(layer, name))
        for known in (ours, theirs):
            torch.testing.assert_close(layer(x), known(x)[0], rtol=0, atol=1e-6)
        bound = 6**-0.5
        assert all(p.abs().max() <= bound and p.abs().max() > bound / 2 for p in layer.parameters())

    @modes
    @settings(max_examples=12, deadline=None)
    @given(B=st.integers(1, 3), T=st.integers(1, 7), D=st.integers(1, 5), H=st.integers(1, 6), seed=st.integers(0, 99))
    def test_fast_is_slow_in_values_and_gradients(self, mode, B, T, D, H, seed):
        layer = holed(mode, D, H, seed)
        x, weight = torch.randn(B, T, D), torch.randn(B, T, H)
        got, want = (
            (y, *torch.autograd.grad((y * weight).sum(), list(layer.parameters())))
            for y in (layer(x), chapter.run_by_steps(layer, x))
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not got[1][~layer.mask_i2h].any() and not got[2][~layer.mask_h2h].any()

    @modes
    def test_no_optimiser_revives_a_masked_weight(self, mode):
        torch.manual_seed(0)
        layer, x = chapter.MaskedRecurrentLayer(5, 6, mode), torch.randn(3, 9, 5)
        adam = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for step in range(15):
            if step == 5:
                layer.mask_i2h.bernoulli_(0.5)
                layer.mask_h2h.bernoulli_(0.5)
            adam.zero_grad()
            layer(x).square().sum().backward()
            adam.step()
            if step >= 5:
                for w, m in chapter.selected([layer]):
                    assert not w.grad[~m].any() and not (w * m)[~m].any()

    def test_masks_are_stored_and_are_no_parameters(self):
        layer = holed("GRU")
        assert {"mask_i2h", "mask_h2h"} <= set(layer.state_dict())
        assert all("mask" not in name for name, _ in layer.named_parameters())
        assert sum(p.numel() for p in layer.parameters()) == 3 * 6 * (5 + 6 + 2)

    @pytest.mark.parametrize("build", [
        lambda: chapter.MaskedRecurrentLayer(3, 4, "RNN"),
        lambda: chapter.StringClassifier("gru"),
        lambda: chapter.ArbitraryStructureRNN(3, [(0, 1), (1, 2)], "lstm"),
    ])  # fmt: skip
    def test_an_unknown_mode_is_refused_with_the_four_names(self, build):
        with pytest.raises(ValueError, match="RNN_TANH, RNN_RELU, GRU, LSTM, got"):
            build()


class TestClassifier:
    @modes
    def test_padding_never_changes_the_logits(self, mode):
        torch.manual_seed(0)
        model = chapter.StringClassifier(mode, layers=2, hidden=9)
        x, lengths = encode(["BTXSE", "BPVVE", "BTSSSXSE"])
        want = model(x, lengths)
        torch.testing.assert_close(model(F.pad(x, (0, 5)), lengths), want)
        for i in range(3):
            n = int(lengths[i])
            torch.testing.assert_close(model(x[i : i + 1, :n], lengths[i : i + 1]), want[i : i + 1])
        model.read = "padded"
        assert not torch.allclose(model(F.pad(x, (0, 5)), lengths), model(x, lengths))

    def test_an_unknown_reading_is_refused(self):
        with pytest.raises(ValueError, match="expected read to be last or padded, got 'mean'"):
            chapter.StringClassifier("GRU", read="mean")

    @pytest.mark.parametrize("seed", [None, 3])
    def test_batches_hold_every_string_once(self, seed):
        data = chapter.reber(230, seed=0)
        seen = [
            bytes(r[:n].tolist()).decode()
            for x, k, _ in chapter.batches(data, 16, seed)
            for r, n in zip(x, k, strict=True)
        ]
        assert sorted(seen) == sorted(data.strings)

    def test_lists_of_triples_know_the_language(self):
        data = chapter.reber(2000, seed=0)
        valid = {s for s in data.strings if is_reber(s)}
        triples, other = chapter.list_of_groups(valid, 3), chapter.reber(500, seed=1)
        assert np.mean(chapter.judged_by_list(triples, other)) > 0.99
        assert np.mean(chapter.judged_by_list(chapter.list_of_groups(valid, 2), other)) < 0.99


class TestPruning:
    def layers(self, seed=0):
        torch.manual_seed(seed)
        return [chapter.MaskedRecurrentLayer(7, 5, "LSTM"), chapter.MaskedRecurrentLayer(5, 5, "LSTM")]

    @settings(max_examples=25, deadline=None)
    @given(low=st.floats(0, 100), high=st.floats(0, 100), i2h=st.booleans(), h2h=st.booleans())
    def test_counts_order_and_nesting(self, low, high, i2h, h2h):
        low, high = sorted((low, high))
        i2h = i2h or not h2h
        masks = []
        for percent in (low, high):
            layers = self.layers()
            chapter.magnitude_masks(layers, percent, i2h, h2h)
            chosen = chapter.selected(layers, i2h, h2h)
            kept = torch.cat([m.flatten() for _, m in chosen])
            sizes = torch.cat([w.abs().flatten() for w, _ in chosen])
            assert abs(int(kept.sum()) - len(kept) * (1 - percent / 100)) <= 1
            if 0 < int(kept.sum()) < len(kept):
                assert sizes[kept].min() >= sizes[~kept].max()
            masks.append(kept)
            for _, m in chapter.selected(layers, not i2h, not h2h):
                assert m.all()
        assert not (masks[1] & ~masks[0]).any()

    def test_threshold_is_numpys_percentile_over_all_layers(self):
        layers = self.layers()
        sizes = np.concatenate([w.detach().abs().double().flatten().numpy() for w, _ in chapter.selected(layers)])
        assert chapter.magnitude_masks(layers, 37) == pytest.approx(np.percentile(sizes, 37))
        per_layer = [m.float().mean() for layer in layers for _, m in chapter.selected([layer])]
        assert len({round(float(v), 3) for v in per_layer}) > 1  # one threshold, different shares

    def test_extremes_and_pruning_twice(self):
        layers = self.layers()
        chapter.magnitude_masks(layers, 0)
        assert chapter.kept_share(layers) == 1
        chapter.magnitude_masks(layers, 60)
        before = [m.clone() for _, m in chapter.selected(layers)]
        chapter.magnitude_masks(layers, 20)
        assert all(torch.equal(a, m) for a, (_, m) in zip(before, chapter.selected(layers), strict=True))
        chapter.magnitude_masks(layers, 100)
        assert chapter.kept_share(layers) == 0

    @pytest.mark.parametrize("percent", [-1, 100.5])
    def test_percent_outside_0_to_100_is_refused(self, percent):
        with pytest.raises(ValueError, match="expected percent between 0 and 100, got"):
            chapter.magnitude_masks(self.layers(), percent)


class TestWithoutRecurrence:
    def test_gru_is_a_linear_scan(self):
        layer, x = holed("GRU"), torch.randn(3, 20, 5)
        layer.mask_h2h.zero_()
        torch.testing.assert_close(chapter.gru_without_recurrence(layer, x), layer(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "mode, remembers", [("RNN_TANH", False), ("RNN_RELU", False), ("GRU", True), ("LSTM", True)]
    )
    def test_only_gated_cells_remember(self, mode, remembers):
        layer, x = holed(mode, share=1.0), torch.randn(1, 6, 5)
        layer.mask_h2h.zero_()
        other = x.clone()
        other[:, 0] += 1
        assert torch.equal(layer(x)[:, -1], layer(other)[:, -1]) != remembers

    @modes
    def test_without_i2h_no_input_reaches_the_state(self, mode):
        layer = holed(mode, share=1.0)
        layer.mask_i2h.zero_()
        assert torch.equal(layer(torch.randn(1, 6, 5)), layer(torch.randn(1, 6, 5)))


graphs = st.tuples(st.sampled_from(["WS", "BA"]), st.integers(10, 40), st.integers(0, 500))


class TestGraphs:
    @settings(max_examples=40, deadline=None)
    @given(graphs)
    def test_layers_are_a_topological_order_by_longest_path(self, drawn):
        kind, n, seed = drawn
        edges = chapter.dag_edges(chapter.random_graph(kind, n, seed))
        layer, dag = chapter.layer_index(n, edges), nx.DiGraph(edges)
        assert all(layer[u] < layer[v] for u, v in edges)
        for v in range(n):
            assert layer[v] == nx.dag_longest_path_length(dag.subgraph(nx.ancestors(dag, v) | {v}))

    def test_the_five_vertices(self):
        edges = [(0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
        assert chapter.layer_index(5, edges) == [0, 0, 1, 2, 3]
        assert chapter.dead_ends(5, edges) == [] and chapter.dead_ends(4, [(0, 1), (1, 2), (0, 3)]) == [3]

    @modes
    @settings(max_examples=8, deadline=None)
    @given(drawn=graphs)
    def test_every_edge_is_in_one_mask_once_per_gate(self, mode, drawn):
        kind, n, seed = drawn
        edges, G = chapter.dag_edges(chapter.random_graph(kind, n, seed)), chapter.GATES[mode]
        net = chapter.ArbitraryStructureRNN(n, edges, mode)
        found = []
        for k, l in net.pairs:
            mask = net.links[f"{k}-{l}"].mask_i2h
            blocks = mask.chunk(G)
            assert all(torch.equal(block, blocks[0]) for block in blocks)
            found += [(net.groups[k][u], net.groups[l][v]) for v, u in blocks[0].nonzero().tolist()]
        assert sorted(found) == edges
        assert sum(int(link.mask_i2h.sum()) for link in net.links.values()) == len(edges) * G
        w = [len(group) for group in net.groups]
        want = 128 * w[0] + G * w[0] * (2 * w[0] + 2) + 2 * w[-1] + 2
        want += sum(G * w[l] * (w[k] + w[l] + 2) for k, l in net.pairs)
        assert sum(p.numel() for p in net.parameters()) == want
        assert net.first.mask_i2h.all() and all(link.mask_h2h.all() for link in net.links.values())

    def test_interleaved_tiling_has_the_same_count_and_another_graph(self):
        edges = chapter.dag_edges(chapter.random_graph("WS", 14, 3))
        blocks, rows = (chapter.edge_masks(14, edges, 3, tiling)[1] for tiling in ("blocks", "interleaved"))
        assert sum(int(m.sum()) for m in blocks.values()) == sum(int(m.sum()) for m in rows.values())
        for pair, m in rows.items():
            np.testing.assert_array_equal(m, np.repeat(blocks[pair].chunk(3)[0].numpy(), 3, 0))
        assert any(not torch.equal(blocks[pair], rows[pair]) for pair in blocks)
        with pytest.raises(ValueError, match="expected tiling to be blocks or interleaved, got 'rows'"):
            chapter.edge_masks(14, edges, 3, "rows")

    @modes
    def test_an_input_reaches_exactly_its_descendants_at_the_first_step(self, mode):
        torch.manual_seed(1)
        n = 16
        edges = chapter.dag_edges(chapter.random_graph("WS", n, 5))
        net, dag = chapter.ArbitraryStructureRNN(n, edges, mode), nx.DiGraph(edges)
        if mode == "RNN_RELU":
            for link in net.links.values():
                nn.init.uniform_(link.bias_ih, 1.0, 2.0)  # keep every unit awake
                nn.init.uniform_(link.weight_ih, 0.0, 0.5)
        y_0 = torch.rand(1, 1, len(net.groups[0]))
        base = net.sequences(y_0)
        for i, u in enumerate(net.groups[0]):
            moved = y_0.clone()
            moved[..., i] += 0.5
            for l, y in enumerate(net.sequences(moved)):
                changed = {net.groups[l][j] for j in (y != base[l])[0, 0].nonzero().flatten().tolist()}
                assert changed == (nx.descendants(dag, u) | {u}) & set(net.groups[l])

    def test_the_embedding_is_as_wide_as_layer_0_unless_told(self):
        edges = chapter.dag_edges(chapter.random_graph("WS", 14, 3))
        net = chapter.ArbitraryStructureRNN(14, edges, "GRU")
        assert net.embedding.embedding_dim == len(net.groups[0])
        assert chapter.ArbitraryStructureRNN(14, edges, "GRU", embedding=8).first.input_size == 8

    @given(seed=st.integers(0, 50), n=st.integers(10, 50))
    @settings(max_examples=20, deadline=None)
    def test_a_barabasi_albert_graph_has_one_source(self, seed, n):
        edges = chapter.dag_edges(chapter.random_graph("BA", n, seed))
        assert chapter.layer_index(n, edges).count(0) == 1

    def test_errors(self):
        with pytest.raises(ValueError, match="expected a graph with edges, got none"):
            chapter.dag_edges(nx.empty_graph(4))
        with pytest.raises(ValueError, match="expected a graph without self-loops, got one at vertex 2"):
            chapter.dag_edges(nx.Graph([(0, 1), (2, 2)]))
        with pytest.raises(ValueError, match="expected kind to be WS or BA, got 'ER'"):
            chapter.random_graph("ER", 12, 0)

    def test_portrait(self):
        graph = chapter.random_graph("WS", 20, 1)
        found = chapter.portrait(graph)
        assert len(found) == 23 and all(np.isfinite(list(found.values())))
        assert found["density"] == pytest.approx(nx.density(graph) / 2)
        values = list(nx.closeness_centrality(graph).values())
        assert found["closeness, std"] == pytest.approx(np.std(values, ddof=1))

    def test_correlation_has_an_interval(self):
        rng = np.random.default_rng(0)
        a = rng.normal(size=200)
        r, low, high = chapter.correlation(a, a + rng.normal(size=200))
        assert low < r < high and low < 2**-0.5 < high
        assert np.isnan(chapter.correlation(a, np.ones(200))).all()


# --- the exercises: every check accepts its solution and refuses plausible wrong answers ---------------------------


def reber_any_end(s):
    state = 0
    for symbol in s:
        if symbol not in chapter.AUTOMATON[state]:
            return False
        state = chapter.AUTOMATON[state][symbol]
    return True


def reber_by_pairs(s):
    allowed = {
        "BT",
        "BP",
        "TS",
        "TX",
        "SS",
        "SX",
        "XS",
        "XX",
        "PT",
        "PV",
        "TT",
        "TV",
        "XT",
        "XV",
        "VP",
        "VV",
        "PX",
        "PS",
        "SE",
        "VE",
    }
    return s[:1] == "B" and s[-1:] == "E" and all(s[i : i + 2] in allowed for i in range(len(s) - 1))


def reber_crashes(s):
    state = 0
    for symbol in s:
        state = chapter.AUTOMATON[state][symbol]
    return state == 7


def sparsity_of_masks(model):
    m = torch.cat(
        [
            m.flatten()
            for part in model.modules()
            if isinstance(part, chapter.MaskedCell)
            for _, m in chapter.selected([part])
        ]
    )
    return 1 - m.float().mean().item()


def sparsity_of_stored_weights(model):
    return torch.cat([p.flatten() for p in model.parameters()]).eq(0).float().mean().item()


def sparsity_with_biases(model):
    parts = [part for part in model.modules() if isinstance(part, chapter.MaskedCell)]
    w = torch.cat([(w * m).flatten() for w, m in chapter.selected(parts)])
    biases = sum(part.bias_ih.numel() + part.bias_hh.numel() for part in parts)
    return float((w == 0).sum()) / (len(w) + biases)


def sparsity_of_a_stack(model):
    w = torch.cat([(w * m).flatten() for w, m in chapter.selected(model.layers)])
    return (w == 0).float().mean().item()


def mask_by_percentile(weights, percent):
    theta = np.percentile(torch.cat([w.abs().flatten() for w in weights]).numpy(), percent)
    return [w.abs() >= theta for w in weights]


def mask_per_tensor(weights, percent):
    return [chapter.solve_magnitude_mask([w], percent)[0] for w in weights]


def mask_signed(weights, percent):
    low = min(w.min() for w in weights)
    return chapter.solve_magnitude_mask([w - low for w in weights], percent)


def mask_of_the_removed(weights, percent):
    return [~m for m in chapter.solve_magnitude_mask(weights, percent)]


def layers_by_number(n, edges):
    return chapter.layer_index(n, edges)


def layers_by_shortest_path(n, edges):
    layer = {v: 0 for v in range(n) if all(w != v for _, w in edges)}
    for _ in range(n):
        for u, v in edges:
            if u in layer and v not in layer:
                layer[v] = layer[u] + 1
    if len(layer) < n:
        raise ValueError("cycle")
    return [layer[v] for v in range(n)]


def layers_without_cycle_check(n, edges):
    layer = [0] * n
    for _ in range(n):
        for u, v in edges:
            layer[v] = max(layer[v], layer[u] + 1)
    return layer


def rounds_of(weights, target, rounds, retrain, *, alive_only=True, equal_steps=False, per_tensor=False):
    masks, history = [torch.ones_like(w, dtype=torch.bool) for w in weights], []
    for k in range(1, rounds + 1):
        share = target * k / rounds if equal_steps else 1 - (1 - target) ** (k / rounds)
        sizes = [torch.where(m, w.abs(), -1.0) if alive_only else w.abs() for w, m in zip(weights, masks, strict=True)]
        if per_tensor:
            masks = [chapter.solve_magnitude_mask([s + 2], 100 * share)[0] for s in sizes]
        else:
            masks = chapter.solve_magnitude_mask([s + 2 for s in sizes], 100 * share)
        retrain(weights, masks)
        history.append(masks)
    return history


def rounds_that_revive(*arguments):
    return rounds_of(*arguments, alive_only=False)


def rounds_of_equal_steps(*arguments):
    return rounds_of(*arguments, equal_steps=True)


def rounds_per_tensor(*arguments):
    return rounds_of(*arguments, per_tensor=True)


def rounds_without_training(weights, target, rounds, retrain):
    return rounds_of(weights, target, rounds, lambda w, m: None)


EXERCISES = [
    ("check_reber", "solve_reber", [reber_any_end, reber_by_pairs, reber_crashes]),
    (
        "check_sparsity",
        "solve_sparsity",
        [sparsity_of_masks, sparsity_of_stored_weights, sparsity_with_biases, sparsity_of_a_stack],
    ),
    (
        "check_magnitude_mask",
        "solve_magnitude_mask",
        [mask_by_percentile, mask_per_tensor, mask_signed, mask_of_the_removed],
    ),
    (
        "check_layers_of",
        "solve_layers_of",
        [layers_by_number, layers_by_shortest_path, layers_without_cycle_check],
    ),
    (
        "check_iterative_prune",
        "solve_iterative_prune",
        [rounds_that_revive, rounds_of_equal_steps, rounds_per_tensor, rounds_without_training],
    ),
]


@pytest.mark.parametrize("check, solution", [(c, s) for c, s, _ in EXERCISES])
def test_solutions_pass(check, solution):
    assert getattr(chapter, check).verdict(getattr(chapter, solution)) == "correct"


@pytest.mark.parametrize("check, wrong", [(c, w) for c, _, wrongs in EXERCISES for w in wrongs])
def test_wrong_answers_do_not_pass(check, wrong):
    assert getattr(chapter, check).verdict(wrong).startswith("not yet: ")


def test_another_right_answer_passes():
    assert chapter.check_iterative_prune.verdict(rounds_of) == "correct"
    assert chapter.check_reber.verdict(is_reber) == "correct"


def test_kleinberg_is_a_grid_with_long_edges():
    for shuffle, seed in itertools.product((False, True), range(3)):
        graph = chapter.kleinberg(4, 2, seed, shuffle)
        assert len(graph) == 16 and nx.is_connected(graph) and graph.number_of_edges() > 24
    assert chapter.layer_index(16, chapter.dag_edges(chapter.kleinberg(4, 2, 0))).count(0) == 1
