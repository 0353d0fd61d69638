"""Batches and states are tensors, or tuples, lists and dicts of them; this walks through all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """Apply `function` to every tensor and keep the containers, named tuples too; other values pass unchanged."""
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {key: map_tensors(function, value) for key, value in nested.items()}
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):  # a named tuple takes its fields one by one
        return type(nested)(*(map_tensors(function, value) for value in nested))
    if isinstance(nested, (tuple, list)):
        return type(nested)(map_tensors(function, value) for value in nested)
    return nested


def tensors_of(nested: Any) -> list[Tensor]:
    """Return every tensor in `nested`, in order."""
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, nested)
    return found
