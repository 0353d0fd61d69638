"""The Transformer baseline: attention against its formula, streaming against reading at once, the block's arithmetic."""

import pytest
import torch
from torch import nn

from seqarch.layers.attention import Block, CausalSelfAttention, FeedForward


def formula(layer, x):
    """Causal attention with explicit loops over heads and positions, in double precision."""
    layer, x = layer.double(), x.double()
    B, T, d = x.shape
    e = d // layer.heads
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    y = torch.zeros_like(x)
    for h in range(layer.heads):
        part = slice(h * e, (h + 1) * e)
        for t in range(T):
            scores = (k[:, : t + 1, part] @ q[:, t, part, None])[..., 0] / e**0.5
            y[:, t, part] = (scores.softmax(-1)[..., None] * v[:, : t + 1, part]).sum(1)
    return layer.out(y)


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_is_the_formula(T, heads):
    layer, x = CausalSelfAttention(8, heads), torch.randn(2, T, 8)
    y = layer(x)
    torch.testing.assert_close(y.double(), formula(layer, x), rtol=1e-5, atol=1e-6)


def test_has_four_matrices_and_nothing_else():
    assert sum(p.numel() for p in CausalSelfAttention(16, 4).parameters()) == 4 * 16 * 16


@pytest.mark.parametrize("mixer", [CausalSelfAttention(16, 4), Block(CausalSelfAttention(16, 2), 16)])
def test_streaming_equals_reading_at_once(mixer):
    x, cache, outputs = torch.randn(3, 12, 16), None, []
    with torch.no_grad():
        for t in range(12):
            y, cache = mixer.step(x[:, t], cache)
            assert all(c.shape[2] == t + 1 for c in cache)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, dim=1), mixer(x), rtol=1e-5, atol=1e-5)


def test_later_tokens_cannot_change_earlier_outputs():
    layer, x = Block(CausalSelfAttention(16, 4), 16, hidden=20), torch.randn(2, 12, 16)
    changed = x.clone()
    changed[:, 7] += 1
    y, z = layer(x), layer(changed)
    assert torch.equal(y[:, :7], z[:, :7])
    assert not torch.equal(y[:, 7], z[:, 7])


def test_the_block_adds_its_two_halves():
    block, x = Block(nn.Identity(), 8, hidden=12), torch.randn(2, 5, 8)
    middle = x + block.mixer_norm(x)
    torch.testing.assert_close(block(x), middle + block.feed_forward(block.feed_norm(middle)))


def test_feed_forward_is_four_times_as_wide_unless_told():
    assert FeedForward(8)[0].out_features == 32 and FeedForward(8, 5)[0].out_features == 5
    x = torch.randn(2, 3, 8)
    feed = FeedForward(8, 5)
    torch.testing.assert_close(feed(x), feed[2](torch.nn.functional.gelu(feed[0](x))))


def test_error_for_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="expected d to be a multiple of heads, got d = 10 and heads = 4"):
        CausalSelfAttention(10, 4)
