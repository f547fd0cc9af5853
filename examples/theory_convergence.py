"""A deep network as a quadrature of an integral equation: errors of eq. (1) and of the second-order scheme over L.

python examples/theory_convergence.py    (a few seconds on a CPU)
"""

import torch

from dnl_kernels import theory

DEPTHS = (16, 32, 64, 128)

# Smooth parameters A(t), a(t), K(t, s), b(t, s) and a bandwidth curve; four positions of three channels.
phi = theory.LayerMap.of("rbf", "tanh", positions=4)
curves = theory.ParameterCurves.random_smooth(12, seed=7, vartheta=phi.parameter_count(12))
x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# The network of infinite depth, by collocation: good to the tolerance at every t.
limit = theory.solve_integral_equation(curves, x, phi, layers=DEPTHS[0])
print(f"x(t) known to about {limit.info['error']:.0e}\n")

for scheme in ("euler", "trapezoid"):
    errors = [theory.forward(curves, x, phi, layers=L, scheme=scheme).distance(limit) for L in DEPTHS]
    print(theory.OrderTable(f"max |x^l - x(t_l)|, {scheme}", DEPTHS, tuple(errors)), "\n")

# Its parameters at depth 16 carried to depth 32: the states change by O(1/16).
shallow = theory.sample_pointwise(curves, 16)
deep = theory.refine(shallow)
change = theory.forward(shallow, x, phi).distance(theory.forward(deep, x, phi))
print(f"depth 16 -> 32 by the extension operators: states change by {change:.3f}")
print(f"regularizer R_L: {theory.regularizer(shallow):.3f} -> {theory.regularizer(deep):.3f}")
