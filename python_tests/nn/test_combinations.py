"""Every combination of a block's options trains, or is refused with its reason."""

import itertools

import pytest
import torch

from dnl_kernels.nn import DNLBlock

AFFINES, KERNELS = ("conv3x3", "conv1x1", "linear"), ("local", "softmax", "gaussian", "dot")
OPTIONS = {
    "norm": ("batch", None),
    "preactivation": (True, False),
    "bottleneck": (None, 2),
    "connectivity": ("dense", 1),
    "input_skip": (False, True),
    "residual": (False, True),
}


def refused(affine, kernel, options):
    if options["bottleneck"] and affine != "conv3x3":
        return "bottleneck is 2 with affine"
    if options["residual"] and kernel == "local":
        return "residual is True"
    return None


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_combination(affine, kernel):
    x = torch.randn((2, 3, 3) if affine == "linear" else (2, 3, 3, 2), dtype=torch.float64)
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        if reason := refused(affine, kernel, options):
            with pytest.raises(ValueError, match=reason):
                DNLBlock(3, 2, 2, affine=affine, kernel=kernel, **options)
            continue
        block = DNLBlock(3, 2, 2, affine=affine, kernel=kernel, activation="tanh", **options).double()
        y = block(x)
        assert y.shape[-1 if affine == "linear" else 1] == 7, options
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters()), options
        twin = DNLBlock(
            3, 2, 2, affine=affine, kernel=kernel, activation="tanh", backend="reference", **options
        ).double()
        twin.load_state_dict(block.state_dict())
        torch.testing.assert_close(block.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-10, msg=str(options))
