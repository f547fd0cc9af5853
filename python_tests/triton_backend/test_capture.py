"""What a CUDA graph needs of the Triton operators, without a GPU: no step waits for the device or reads its data.

Two views. The launchers run on meta tensors, which have no data to depend on, so the same tensors are allocated and the
same kernels launched whatever the values are. The public block runs on fake CUDA tensors. In both, every operation that
would synchronise with the host or touch another device is an error. A graph is captured for real in python_tests/gpu.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton exists for Linux only")

from triton.runtime.jit import JITFunction

import dnl_kernels as dnl
from dnl_kernels import _triton
from dnl_kernels.nn import depth
from dnl_kernels.ops.dnl_block import fused
from dnl_kernels.testing import dnl_block, triton_compile, triton_gate

# Operations whose result on the host, or whose shape, depends on data: the host waits for the device.
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "allclose",
}  # fmt: skip


class Captured(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold."""

    def __init__(self, device):
        self.device, self.seen = device, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device")
        result = function(*arguments, **keywords)
        for t in torch.utils._pytree.tree_leaves((arguments, keywords, result)):
            scalar = isinstance(t, torch.Tensor) and t.dim() == 0  # a number of the host, a parameter of the launch
            if isinstance(t, torch.Tensor) and t.device.type != self.device and not scalar:
                raise RuntimeError(f"{name} has a tensor on {t.device}")
            if isinstance(t, torch.Tensor) and t.dtype == torch.bool and name.startswith("index"):
                raise RuntimeError(f"{name} by a mask has a shape that depends on data")
        self.seen += 1
        return result


CALLS = [(operator, case) for operator, calls in triton_gate.CALLS.items() for case in calls(torch.bfloat16)]


@pytest.mark.parametrize("operator, case", CALLS)
def test_no_launcher_waits_for_the_device(operator, case, monkeypatch):
    launched = []
    call = triton_gate.CALLS[operator](torch.bfloat16)[case]
    with triton_compile.compiling(86), Captured("meta") as mode:
        monkeypatch.setattr(JITFunction, "run", lambda self, *_, grid, **__: launched.append((self.fn.__name__, grid)))
        call()
    assert launched and mode.seen and all(isinstance(n, int) for _, grid in launched for n in grid)


@pytest.mark.parametrize("capturing", [False, True])
def test_nothing_is_measured_during_a_capture(capturing, monkeypatch):
    """DNL_TRITON_AUTOTUNE=1: a measurement waits for the device, which ends the capture with an error."""
    ran = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: ran.append((self.name, options))

    monkeypatch.setattr(_triton, "AUTOTUNE", True)
    monkeypatch.setattr(_triton, "_tuned", lambda kernel: Kernel("tuned"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    _triton.launch(Kernel("given"), 1, num_warps=4, num_stages=2, N=3)
    given = ("given", {"num_warps": 4, "num_stages": 2, "N": 3})
    assert ran == [given if capturing else ("tuned", {"N": 3})]


@pytest.mark.parametrize("name", ["densenet", "equation-1-batch-norm", "conv1x1-softmax", "tokens-gaussian"])
def test_a_training_steps_operators_do_not_wait(name):
    """Everything around the launchers: packing, statistics, folding, the composition of the other blocks."""
    case = dnl_block.CASES[name]
    x0, layers = dnl_block.inputs(case, torch.float32)
    with FakeTensorMode(), Captured("cuda") as mode:
        x0 = torch.empty(x0.shape, device="cuda")
        layers = [{n: torch.empty(t.shape, device="cuda") for n, t in layer.items()} for layer in layers]
        parameters = [dnl_block.LayerParameters(**layer) for layer in layers]
        states = dnl_block.dnl_block(x0, parameters, case.config, backend="triton")
        if case.config.kernel == "local":  # one node, whose backward packs and unpacks too
            call, tensors = fused.Call(case.config, "triton"), [getattr(p, n) for p in parameters for n in fused.NAMES]
            extra = fused._forward(call, [x0, *tensors])
            fused._backward(call, extra[0], [x0, *tensors], extra, [True] * (1 + len(tensors)))
    assert mode.seen and states.device.type == "cuda"


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_products_does_not_wait(causal):
    """kernel="dot", which has no kernel of its own: whatever torch does for it can be captured."""
    with FakeTensorMode(), Captured("cuda") as mode:
        q, k, v = (torch.empty(2, 3, 40, 8, device="cuda") for _ in range(3))
        dnl.nonlocal_attention(q, k, v, kernel="dot", causal=causal, backend="triton")
    assert mode.seen


@pytest.mark.parametrize("calls, states", [(range(5), range(5)), (range(0, 6, 2), range(6)), ([0, 1, 4], [3])])
@pytest.mark.parametrize("channels", [(), (5,)], ids=["scalar", "channels"])
def test_the_weight_gradient_of_depth_weighted_sums_does_not_wait(calls, states, channels):
    """It is deferred to the end of a backward pass, so that it must be captured with it."""
    found = depth._Pass()
    with FakeTensorMode(), Captured("cuda") as mode:
        found.dy = {call: torch.empty(3, 5, device="cuda") for call in calls}
        found.x = {state: torch.empty(3, 5, device="cuda") for state in states}
        pattern = depth.Pattern(2, 2, 1, None)
        depth._weight_gradient(found, torch.Size((6, 6, *channels)), torch.empty(0, device="cuda"), pattern)
    assert mode.seen


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
    ],
)
def test_every_kind_of_waiting_is_seen(wait):
    with FakeTensorMode(allow_non_fake_inputs=True), Captured("cuda"):
        x = torch.empty(3, device="cuda")
        with pytest.raises(RuntimeError, match="waits|a tensor on|depends on data|nonzero"):
            wait(x)
