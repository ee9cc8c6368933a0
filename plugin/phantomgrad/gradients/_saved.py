"""What a recorded evaluation saves for backward, where the caller packs it.

Note [Saved tensors]
The products of one backward pass unpack again and again what the recorded evaluation saved. Under activation checkpointing
that would run the checkpointed region each time, solve included; under offloading, fetch from the host. So what the caller's
hooks have packed is unpacked once, in the caller's own backward pass before the first product, and kept until that
pass has used it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks


class _Holder:
    """A saved tensor as the caller packed it."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.value: Tensor | None = None


class SavedOnce:
    """The saved tensors of one evaluation within the caller's `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self._pack_once, self._unpack_once = pack, unpack
        self._holders: list[weakref.ref[_Holder]] = []
        self._keep = False

    @staticmethod
    def where_hooked() -> SavedOnce | None:
        """None where no such hooks are set."""
        hooks = _top_saved_tensors_default_hooks(False)
        return None if hooks is None else SavedOnce(*hooks)

    def recording(self) -> AbstractContextManager[Any]:
        """Around the evaluation."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @contextmanager
    def unpacked(self) -> Generator[None, None, None]:
        """Around the products of one backward pass."""
        for reference in self._holders:
            holder = reference()
            if holder is not None:
                holder.value = self._unpack_once(holder.packed)
        self._keep = True
        try:
            yield
        finally:
            self._keep = False

    def _pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder(self._pack_once(tensor))
        self._holders.append(weakref.ref(holder))
        return holder

    def _unpack(self, holder: _Holder) -> Tensor:
        value = holder.value
        if value is None:
            return self._unpack_once(holder.packed)
        if not self._keep:
            holder.value = None
        return value
