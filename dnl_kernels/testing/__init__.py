"""Error budgets, named cases and inputs, shared by python_tests and bench.

`testing/<op>.py` holds the named cases of an operator; `testing/operators.py` lists the operators for the tests that
treat them all alike.
"""

from .budget import Exact, assert_within_budget, cotangent, exactly, relative_error

__all__ = ["Exact", "assert_within_budget", "cotangent", "exactly", "relative_error"]
