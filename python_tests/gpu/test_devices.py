"""Several GPUs in one process: tensors of a device that is not the current one, and gradients of both."""

import pytest
import torch

from dnl_kernels.testing import named

from .refusals import skipped_where_refused
from .targets import CUDA, EMULATED, OPERATORS, every_pair

several = pytest.mark.skipif(EMULATED or torch.cuda.device_count() < 2, reason="there are not two CUDA devices here")


@several
@every_pair
def test_tensors_of_another_device_than_the_current_one(op, backend):
    assert torch.cuda.current_device() == 0
    make = next(iter(named.CASES[op].values()))
    with skipped_where_refused():
        named.check(make(torch.float32), backend, "cuda:1")
    assert torch.cuda.current_device() == 0


@several
@every_pair
def test_two_devices_take_turns(op, backend):
    """Each gives what it gives alone: kernels are loaded, allowed shared memory and tuned for each."""
    leaves = [leaf.detach() for leaf in OPERATORS[op].leaves(torch.float32, 2)]

    def run(device):
        there = [leaf.to(device).requires_grad_() for leaf in leaves]
        y = OPERATORS[op].call(*there, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), there)]

    with skipped_where_refused():
        alone = run("cuda:0")
    for _ in range(2):
        for device in ("cuda:1", "cuda:0"):
            for found, expected in zip(run(device), alone, strict=True):
                assert found.device == torch.device(device)
                torch.testing.assert_close(found.cpu(), expected.cpu())


@several
def test_a_stream_of_another_device():
    """The kernel runs on the current stream of its tensors' device, not of the current device."""
    op = OPERATORS["dense_sum"]
    leaves = [leaf.to("cuda:1") for leaf in op.leaves(torch.float32, 2)]
    expected = op.call(*leaves, backend=CUDA)
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")), torch.cuda.device(0):
        found = op.call(*leaves, backend=CUDA)
    torch.cuda.synchronize("cuda:1")
    assert torch.equal(found, expected)
