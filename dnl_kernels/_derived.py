"""What is computed from parameters once and used until they change: packed weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class _Entry(NamedTuple):
    references: list[weakref.ref]
    state: tuple
    derived: Any


class DerivedCache:
    """make()'s results by the tensors that they were made from.

    One is used again for the very same tensor objects, with the memory that they had and the version that autograd
    counts: every operation in place, load_state_dict and an assignment to `.data` makes a new one. Writing through
    `.data` (as in `p.data.mul_(2)`) is counted by nobody; `clear` is for those who do. Tensors made in inference mode
    have no version: nothing is kept for them. An entry lives as long as all of its tensors.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple, _Entry] = {}

    def get(self, tensors: Sequence[Tensor | None], also: Hashable, make: Callable[[], Any]) -> Any:
        present = [t for t in tensors if t is not None]
        if any(t.is_inference() for t in present):
            return make()
        key = (also, tuple(map(id, tensors)))
        state = tuple((t.data_ptr(), t._version, t.dtype) for t in present)
        entry = self._entries.get(key)
        if (
            entry is not None
            and entry.state == state
            and all(r() is t for r, t in zip(entry.references, present, strict=True))
        ):
            return entry.derived
        derived = make()
        # The first tensor that dies takes the entry along; its id may be another's from then on.
        drop = _Drop(weakref.ref(self), key)
        self._entries[key] = _Entry([weakref.ref(t, drop) for t in present], state, derived)
        return derived

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class _Drop:
    def __init__(self, cache: weakref.ref, key: tuple):
        self.cache, self.key = cache, key

    def __call__(self, _: weakref.ref) -> None:
        cache = self.cache()
        if cache is not None:
            cache._entries.pop(self.key, None)
