"""The error budget: a kernel may be twice as wrong against float64 as eager PyTorch in the same dtype, and no more."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual - exact| / max |exact| (absolute where exact is zero); NaN and inf must stand at the same places."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(exact.shape)}")
    actual, exact = actual.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(actual.isnan(), exact.isnan()):
        raise AssertionError("non-finite values at other places than expected")
    if not finite.any():
        return 0.0
    scale = exact[finite].abs().max().item()
    return ((actual - exact)[finite].abs().max() / (scale if scale > 0 else 1.0)).item()


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, eager: Tensor, factor: float = 2.0, floor: float = 0.0
) -> None:
    """err(actual) <= factor * (max(err(eager), floor) + rounding). floor: an error that eager may have escaped by luck.

    exact: the float64 result. eager: the reference in actual's dtype. rounding: two units in the last place of the
    largest result, so that an eager result that happens to be exact does not demand the same of the kernel. In float64
    eager is exact by definition, and the kernel may differ by the order of its sums: 1e-12.
    """
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name} is of {actual.dtype}, expected {eager.dtype}")
    error, baseline = relative_error(actual, exact), max(relative_error(eager, exact), floor)
    rounding = 5e-13 if actual.dtype == torch.float64 else 2 * torch.finfo(actual.dtype).eps
    budget = factor * (baseline + rounding)
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.2e} exceeds the budget {budget:.2e} (eager: {baseline:.2e})")
