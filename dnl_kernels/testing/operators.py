"""The operators as data. A new one adds one `Operator` to its `testing/<op>.py` and its name to the list below."""

from __future__ import annotations

from . import dense_conv2d, dense_linear, dense_sum, dnl_block, dnl_layer, nonlocal_attention
from .operator import Operator

MODULES = (dense_conv2d, dense_sum, dense_linear, nonlocal_attention, dnl_layer, dnl_block)


def operators() -> list[Operator]:
    return [module.OPERATOR for module in MODULES]
