"""seqarch.data.listops: expressions that are well formed, and values that an independent reader agrees with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.data.listops import SYMBOLS, listops, write


def draw(count=8, seed=0, **how):
    how = dict(shortest=4, longest=80, depth=4, arguments=5) | how
    return listops(count, torch.Generator().manual_seed(seed), **how)


def read(text):
    """Value and depth of an expression, by a stack."""
    stack, deepest = [], 0
    for symbol in text.split():
        if symbol == "]":
            name, *values = stack.pop()
            assert len(values) >= 2
            values.sort()
            middle = values[len(values) // 2] if len(values) % 2 else sum(values[len(values) // 2 - 1 :][:2]) // 2
            value = {"MIN": values[0], "MAX": values[-1], "MED": middle, "SM": sum(values) % 10}[name]
            if not stack:
                return value, deepest
            stack[-1].append(value)
        elif symbol.startswith("["):
            stack.append([symbol[1:]])
            deepest = max(deepest, len(stack))
        else:
            stack[-1].append(int(symbol))
    raise AssertionError(f"a bracket is not closed: {text}")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 6), arguments=st.integers(2, 10))
def test_expressions_are_well_formed_and_their_values_right(seed, depth, arguments):
    data = draw(4, seed, depth=depth, arguments=arguments)
    for x, length, y in zip(data.x, data.length, data.y, strict=True):
        assert 4 <= length <= 80 and (x[:length] > 0).all() and (x[length:] == 0).all()
        value, deepest = read(write(x))
        assert value == y and deepest <= depth and len(write(x).split()) == length


def test_layout():
    data = draw(5)
    assert data.x.shape == (5, 80) and data.x.dtype == torch.long and data.y.dtype == torch.long
    assert len(SYMBOLS) == 16 and SYMBOLS[0] == "<pad>"
    assert write([12, 3, 10, 0, 15, 0]) == "[MAX 2 9 ]"


def test_every_operation_and_every_digit_turns_up():
    data = draw(200)
    assert set(data.x.flatten().tolist()) == set(range(16))
    assert set(data.y.tolist()) == set(range(10))


def test_the_full_size():
    data = listops(3, torch.Generator().manual_seed(0))
    assert data.x.shape == (3, 2000) and data.length.min() >= 500
    assert all(read(write(x))[0] == y for x, y in zip(data.x, data.y, strict=True))


def test_the_generator_decides():
    assert torch.equal(draw(4, 5).x, draw(4, 5).x)
    assert not torch.equal(draw(4, 5).x, draw(4, 6).x)


def test_errors():
    with pytest.raises(ValueError, match="expected count >= 1, depth >= 1 and arguments >= 2, got count=0"):
        draw(0)
    with pytest.raises(ValueError, match=r"can have \(4 to 4\), got 5 to 80"):
        draw(depth=1, arguments=2, shortest=5)
    with pytest.raises(ValueError, match="got 4 to 3"):
        draw(longest=3)
