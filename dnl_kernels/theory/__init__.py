"""The continuous-depth side of Dense Non-Local networks: everything in float64, differentiable, torch only.

Curves and parameters, samplings and extensions, norms and regularizers, solvers, bounds, learning problems. A docstring
that cites "DNL (1)" or "DNL Def. 2" refers to the paper (arXiv 2510.02049); "reconstructed" marks formulas that its
available text does not contain.
"""

from .adjoint import AdjointResult, adjoint
from .blocks import as_block
from .bounds import (
    convergence_constant,
    growth_constant,
    lipschitz_constant,
    parameter_lipschitz_constant,
    state_bound,
    trajectory_bound,
)
from .cascade import coarsen, refine
from .curves import BasisCurve, CosineBasis, ParameterCurves, SampledCurve
from .depth import CallableKernel, DepthKernel, SampledKernel, WeaklySingularKernel
from .extension import (
    PiecewiseBilinear,
    PiecewiseConstant,
    PiecewiseConstant2d,
    PiecewiseLinear,
    distance,
    extend,
    extended_curves,
    piecewise_bilinear,
    piecewise_constant,
    piecewise_linear,
    prolong,
    restrict,
)
from .galerkin import Certificate, ContinuousMinimizer, certify, minimize_continuous
from .integral import Solution, solve_integral_equation
from .learning import GammaFunctional, LearningProblem, Minimizer, problem_a, problem_b
from .operators import (
    EmbeddedGaussianKernel,
    GaussianKernel,
    LayerMap,
    LocalKernel,
    NonLocalOperator,
    RBFKernel,
)
from .orders import OrderTable, fitted_order, observed_order, richardson
from .parameters import DiscreteParameters, flip, pack, unpack
from .regularity import DepthRegularity, depth_regularity
from .regularization import (
    regularizer,
    regularizer_continuous,
    regularizer_continuous_terms,
    regularizer_terms,
)
from .sampling import sample_cell_average, sample_pointwise
from .segments import final_state
from .solve import IntegralProblem, solve
from .solvers import Trajectory, forward
from .spectral import SobolevPreconditioner, dct_matrix, sobolev_gradient
from .structured import ExponentialSumKernel, SeparableKernel, ToeplitzKernel

__all__ = [
    "AdjointResult",
    "BasisCurve",
    "CallableKernel",
    "Certificate",
    "ContinuousMinimizer",
    "CosineBasis",
    "DepthKernel",
    "DepthRegularity",
    "DiscreteParameters",
    "EmbeddedGaussianKernel",
    "ExponentialSumKernel",
    "GammaFunctional",
    "GaussianKernel",
    "IntegralProblem",
    "LayerMap",
    "LearningProblem",
    "LocalKernel",
    "Minimizer",
    "NonLocalOperator",
    "OrderTable",
    "ParameterCurves",
    "PiecewiseBilinear",
    "PiecewiseConstant",
    "PiecewiseConstant2d",
    "PiecewiseLinear",
    "RBFKernel",
    "SampledCurve",
    "SampledKernel",
    "SeparableKernel",
    "SobolevPreconditioner",
    "Solution",
    "ToeplitzKernel",
    "Trajectory",
    "WeaklySingularKernel",
    "adjoint",
    "as_block",
    "certify",
    "coarsen",
    "convergence_constant",
    "dct_matrix",
    "depth_regularity",
    "distance",
    "extend",
    "extended_curves",
    "final_state",
    "fitted_order",
    "flip",
    "forward",
    "growth_constant",
    "lipschitz_constant",
    "minimize_continuous",
    "observed_order",
    "pack",
    "parameter_lipschitz_constant",
    "piecewise_bilinear",
    "piecewise_constant",
    "piecewise_linear",
    "problem_a",
    "problem_b",
    "prolong",
    "refine",
    "regularizer",
    "regularizer_continuous",
    "regularizer_continuous_terms",
    "regularizer_terms",
    "restrict",
    "richardson",
    "sample_cell_average",
    "sample_pointwise",
    "sobolev_gradient",
    "solve",
    "solve_integral_equation",
    "state_bound",
    "trajectory_bound",
    "unpack",
]
