"""What is computed from parameters once and used until they change: packed weights of evaluation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _extension

PLAIN = (Tensor, nn.Parameter)


class _Entry(NamedTuple):
    tensors: Sequence[Tensor]
    layout: Any
    also: Hashable
    digest: int
    made: Any


class Kept:
    """The last result of `make`, given again while the tensors that it was made from are the same.

    The same objects, in the same memory, with the version that autograd counts for every operation in place. Nothing
    counts what is written through `.data` (`p.data.mul_(2)`), so that a digest of the contents is compared too: all of
    a small tensor, eight bytes of every 256 of a large one. A change of single numbers through `.data` between two
    evaluations is not seen; `clear` is for who does that. Tensors of inference mode, which have no version, and those
    on other devices than the CPU are not kept. A copy of it has nothing yet.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, tensors: Sequence[Tensor | None], also: Hashable, make: Callable[[], Any]) -> Any:
        """make(), or what it returned last time for the same tensors and an equal `also`."""
        given = [t for t in tensors if t is not None]
        entry = self._entry
        if entry is not None and len(entry.tensors) == len(given) and entry.also == also:
            if all(map(operator.is_, entry.tensors, given)) and entry.layout == (layout := _layout(given)):
                if entry.digest == _digest(layout):
                    return entry.made
        made = make()
        self._entry = None
        if all(map(_can_be_kept, given)):
            layout = _layout(given)
            self._entry = _Entry(given, layout, also, _digest(layout), made)
        return made

    def __deepcopy__(self, _: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def clear(self) -> None:
        """Forgets the result."""
        self._entry = None


def _layout(tensors: Sequence[Tensor]) -> Any:
    versions = [t._version for t in tensors]
    pointers = [t.data_ptr() for t in tensors]
    return versions, pointers, [t.nbytes for t in tensors], [t.stride() for t in tensors]


def _digest(layout: Any) -> int:
    library: Any = _extension._C
    return library.digest(layout[1], layout[2])


def _can_be_kept(t: Tensor) -> bool:
    """Whether its memory can be read as one piece, and its version be asked for."""
    if type(t) not in PLAIN or t.device.type != "cpu" or t.is_inference():
        return False
    forms = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    ranks: tuple[tuple[int, ...], ...] = (tuple(range(9)), (4,), (5,))
    return any(t.dim() in dims and t.is_contiguous(memory_format=f) for f, dims in zip(forms, ranks, strict=True))
