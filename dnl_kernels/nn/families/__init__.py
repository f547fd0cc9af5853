"""The kinds of modules that `accelerate` knows. A new kind is one file here and one line below."""

from .base import Family
from .dense import DenseBlocks
from .depth import DepthWeightedAverages
from .final import FinalPoolings
from .non_local import ConcatenatedNonLocalBlocks, NonLocalBlocks
from .residual import ResidualDenseBlocks
from .stem import Stems
from .transition import Transitions

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ResidualDenseBlocks(), DenseBlocks(), Transitions(), NonLocalBlocks(), ConcatenatedNonLocalBlocks(),
        DepthWeightedAverages(), Stems(), FinalPoolings(),
    )
}  # fmt: skip
