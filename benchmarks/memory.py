"""How much memory a call needs at its peak, on a CPU where no allocator keeps count."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors created inside a ``with`` block that are still alive, and their peak.

    What one operator allocates and frees inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operator and count the storages of its results that are new."""
        # a view or an in-place result shares its storage with an argument, which may come from outside the block
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self._known.add(x.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes alive at the worst moment of ``call()``, beyond those that were there before."""
    with LiveBytes() as live:
        call()
    return live.peak
