"""Error budgets, named cases and inputs, shared by python_tests and bench.

`testing/<op>.py` holds the named cases of an operator; `testing/operators.py` lists the operators for the tests that
treat them all alike.
"""

from .._activations import KINDS
from .budget import Exact, assert_within_budget, cotangent, exactly, relative_error

__all__ = ["ACTIVATIONS", "Exact", "assert_within_budget", "cotangent", "exactly", "relative_error"]

ACTIVATIONS = (*KINDS, "leaky_relu(0.2)", "leaky_relu(-1.5)")  # every kind, and slopes of both signs
