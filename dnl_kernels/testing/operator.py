"""An operator as data, for the tests that hold every operator to the same contract (python_tests/test_contracts.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operator(NamedTuple):
    """name: as in `dnl`. leaves(dtype, batch): a small example's differentiable tensors, drawn from torch's generator.
    names: the leaves' names. call(*leaves, backend=None): the public function on them. batched: the leaves whose
    dimension 0 is the batch. registered(*leaves): arguments for the registered operators, for opcheck; empty for a
    composition of other operators. narrows: whether an autocast region runs it in its dtype, as it does products."""

    name: str
    leaves: Callable[[torch.dtype, int], list[Tensor]]
    names: tuple[str, ...]
    call: Callable[..., Tensor]
    batched: tuple[int, ...]
    registered: Callable[..., dict[str, tuple[Any, ...]]]
    narrows: bool = True
