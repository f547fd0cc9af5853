"""The operators, functions of tensors: what `torch.nn.functional` is to `torch.nn`."""

from .ops.dense_conv2d.api import dense_conv2d
from .ops.dense_linear.api import dense_linear
from .ops.dense_sum.api import dense_sum
from .ops.dnl_block.api import dnl_block
from .ops.dnl_layer.api import dnl_layer
from .ops.nonlocal_attention.api import nonlocal_attention

__all__ = ["dense_conv2d", "dense_linear", "dense_sum", "dnl_block", "dnl_layer", "nonlocal_attention"]
