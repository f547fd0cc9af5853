"""Modules over the operators: blocks, networks, non-local blocks, depth-weighted sums."""

from .accelerate import accelerate, restore
from .block import DNLBlock
from .depth import DenseSum
from .network import DNLNet
from .nonlocal2d import NonLocal2d

__all__ = ["DNLBlock", "DNLNet", "DenseSum", "NonLocal2d", "accelerate", "restore"]
