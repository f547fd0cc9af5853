"""Dense non-local networks for PyTorch: fused operators, modules, and the continuous-depth theory.

y_l = A_l x_0 + a_l + tau sum_{j<=l} (K_{l,j} x_j + b_{l,j}),  x_{l+1} = sigma(N(y_l; theta_l)): arXiv 2510.02049.
"""

from . import functional
from .functional import dense_conv2d, dense_linear, dense_sum, dnl_block, dnl_layer, nonlocal_attention
from .nn import DenseSum, DNLBlock, DNLNet, NonLocal2d, accelerate, restore
from .ops.dnl_block.config import BlockConfig, LayerParameters
from .ops.dnl_layer.config import NonLocalParameters

__version__ = "0.1.0"

__all__ = [
    "BlockConfig",
    "DNLBlock",
    "DNLNet",
    "DenseSum",
    "LayerParameters",
    "NonLocal2d",
    "NonLocalParameters",
    "accelerate",
    "dense_conv2d",
    "dense_linear",
    "dense_sum",
    "dnl_block",
    "dnl_layer",
    "functional",
    "nonlocal_attention",
    "restore",
]
