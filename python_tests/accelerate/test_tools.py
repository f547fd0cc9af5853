"""What people put around a network, on an accelerated one: compilers, exporters, wrappers, averages, checkpoints."""

import copy
import functools
import io
import os

import pytest
import torch
from compare import assert_same, everything, randomise
from copies import CASES, DenseFormer, DenseNet, Features, JoinedBlock, NonLocal, Perceptron, Upscaler
from torch import nn
from torch.utils.checkpoint import checkpoint

import dnl_kernels as dnl

MODELS = {
    "list": DenseNet,
    "joined": lambda: DenseNet(JoinedBlock),
    "residual dense": Upscaler,
    "non-local": lambda: nn.Sequential(nn.Conv2d(3, 6, 1), NonLocal()),
}
every_model = pytest.mark.parametrize("name", MODELS)
TRACED = {
    **MODELS,
    "features": Features,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(168, 4), Perceptron()),
}
every_traced_model = pytest.mark.parametrize("name", TRACED)


def both(name="list", dtype=torch.float64):
    torch.manual_seed(0)
    plain = randomise(TRACED[name]()).to(dtype)
    return plain, dnl.accelerate(copy.deepcopy(plain)), torch.randn(3, 3, 8, 7, dtype=dtype)


@every_traced_model
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile(name, training):
    plain, fast, x = both(name)
    plain.train(training), fast.train(training)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    found, expected = everything(compiled, x), everything(plain, x)
    assert_same({key.replace("_orig_mod.", ""): value for key, value in found.items()}, expected)


@every_traced_model
def test_export_and_aot(name):
    """The program that is exported has PyTorch's own operators only: whoever loads it needs no other package."""
    plain, fast, x = both(name)
    program = torch.export.export(fast.eval(), (x,))
    assert not [node for node in program.graph.nodes if "dnl" in str(node.target)]
    torch.testing.assert_close(program.module()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)


@every_model
def test_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    plain, fast, x = both(name, torch.float32)
    file = io.BytesIO()
    torch.onnx.export(fast.eval(), (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), plain.eval()(x), rtol=1e-3, atol=1e-4)


@every_traced_model
def test_script_trace_and_fx(name):
    plain, fast, x = both(name)
    plain.eval(), fast.eval()
    expected = plain(x)
    if name != "non-local":  # whose original cannot be scripted either
        scripted = None
        try:
            scripted = torch.jit.script(plain)
        except Exception:  # noqa: BLE001
            with pytest.raises(Exception):  # noqa: B017
                torch.jit.script(fast)
        if scripted is not None:
            torch.testing.assert_close(torch.jit.script(fast)(x), expected)
    traced = torch.jit.trace(fast, x)
    assert "dnl::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)


def test_fx_keeps_the_original():
    from torchvision.models.feature_extraction import create_feature_extractor

    plain, fast, x = both()
    nodes = ["block1.denselayer2.conv2", "transition.pool", "head"]
    found, expected = (create_feature_extractor(m.eval(), nodes)(x) for m in (fast, plain))
    for node in nodes:
        torch.testing.assert_close(found[node], expected[node])
    graph = torch.fx.symbolic_trace(fast.block1)  # the block itself as the root
    inner = fast.stem(x)
    torch.testing.assert_close(graph(inner), plain.block1(inner))


def test_quantize_dynamic():
    plain, fast, x = both(dtype=torch.float32)
    plain, fast = (torch.ao.quantization.quantize_dynamic(m.eval(), {nn.Linear}) for m in (plain, fast))
    assert type(fast.block1).__mro__[2] is type(plain.block1)
    torch.testing.assert_close(fast(x), plain(x), rtol=0.05, atol=0.05)
    report = dnl.accelerate(plain, report=True)  # the other way round
    assert len(report.accelerated) == 3
    torch.testing.assert_close(plain(x), fast(x), rtol=0.05, atol=0.05)


@every_model
def test_averages_of_weights(name):
    plain, fast, x = both(name)
    averages = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (plain, fast)]
    for step in range(2):
        for model, average in zip((plain, fast), averages, strict=True):
            everything(model, x + step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            average.update_parameters(model)
    assert_same(everything(averages[1], x), everything(averages[0], x), 1e-8)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["block1", "transition", "model"])
def test_activation_checkpointing(what, reentrant):
    """The numbers of a step without it: a batch is counted once, where torch.utils.checkpoint counts it twice."""

    def run(model, x):
        if what == "model":
            return checkpoint(model, x, use_reentrant=reentrant)
        module = model.get_submodule(what)
        module.forward, original = (
            functools.partial(checkpoint, module.forward, use_reentrant=reentrant),
            module.forward,
        )
        try:
            return model(x)
        finally:
            module.forward = original

    plain, fast, x = both()
    buffers = {name for name, _ in plain.named_buffers()}
    for model in (plain, fast):
        model(x)  # with a plan
    plain_step = everything(plain, x)
    x.requires_grad_()
    fast.zero_grad()
    out = run(fast, x)
    out.backward(torch.linspace(-3, 3, out.numel(), dtype=out.dtype).view_as(out).sin())
    found = {"output": out.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in fast.named_parameters()}
    found |= dict(fast.named_buffers())
    counted = {n for n in buffers if what in ("model", n.split(".")[0])} if what != "block1" else set()
    expected = {k: v for k, v in plain_step.items() if k not in counted}
    assert_same({k: v for k, v in found.items() if k in expected}, expected)
    for name in counted:  # by the modules of PyTorch around the blocks
        if name.startswith(("block1", "block2", "transition")):
            torch.testing.assert_close(found[name], plain_step[name])


@pytest.mark.parametrize("compute", ["vmap", "jvp", "per-sample gradients", "hessian"])
def test_function_transforms(compute):
    """The original forward runs within them."""
    plain, fast, x = both()
    plain.eval(), fast.eval()
    parameters = dict(plain.named_parameters())

    def loss(model, parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    def result(model):
        if compute == "vmap":
            return torch.func.vmap(lambda x: model(x[None]))(x)
        if compute == "jvp":
            return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
        if compute == "hessian":
            return torch.func.hessian(lambda x: model(x).square().sum())(x[:1, :, :2, :2])
        return torch.func.vmap(torch.func.grad(functools.partial(loss, model)), (None, 0))(parameters, x)

    found, expected = result(fast), result(plain)
    for key in expected if isinstance(expected, dict) else [...]:
        torch.testing.assert_close(found[key], expected[key])


def test_counting_operations():
    """A dispatch mode sees PyTorch's operators."""
    from torch.utils.flop_counter import FlopCounterMode

    plain, fast, x = both()
    counts = []
    for model in (plain.eval(), fast.eval()):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@every_model
def test_meta_and_half_models(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert dnl.accelerate(model, report=True).accelerated
    assert model.eval()(torch.empty(2, 3, 8, 7, device="meta")).device.type == "meta"
    plain, fast, x = both(name)
    model.to_empty(device="cpu").load_state_dict(plain.float().state_dict())
    torch.testing.assert_close(model(x.float()), plain.float().eval()(x.float()), rtol=1e-3, atol=1e-4)
    half = MODELS[name]().to(torch.bfloat16).eval()
    x = x.bfloat16()
    exact = copy.deepcopy(half).double()(x.double())
    error = (half(x).double() - exact).abs().max()
    found = dnl.accelerate(half)(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 2 * error + 2**-7 * exact.abs().max()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["layers", "blocks"])
def test_fully_shard(process_group, what, when):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, fast, x = both()
    dnl.restore(fast)
    mesh = init_device_mesh("cpu", (1,))
    if when == "after":
        dnl.accelerate(fast)
    for model in (plain, fast):
        inner = list(model.block1.values()) if what == "layers" else [model.block1, model.transition, model.block2]
        for module in (*inner, model):
            fully_shard(module, mesh=mesh)
    if when == "before":
        assert len(dnl.accelerate(fast, report=True).accelerated) == 3

    def full(found):
        return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}

    for _ in range(2):
        assert_same(full(everything(fast, x)), full(everything(plain, x)))


def test_distributed_data_parallel(process_group):
    plain, fast, x = both()
    plain, fast = nn.parallel.DistributedDataParallel(plain), nn.parallel.DistributedDataParallel(fast)
    assert_same(everything(fast, x), everything(plain, x))
    dnl.restore(fast)
    assert len(dnl.accelerate(fast, report=True).accelerated) == 3  # within the wrapper
    assert_same(everything(fast, x), everything(plain, x))


def test_replicas_of_data_parallel():
    """What nn.DataParallel makes for every device: shallow copies with tensors of their own."""
    plain, fast, x = both()
    fast(x)  # with an executor
    replicas = {}
    for name, module in fast.named_modules():
        replicas[name] = replica = module._replicate_for_data_parallel()
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else 1.5 * parameter)
        replica._buffers = {key: value.clone() for key, value in module._buffers.items()}
        for key in replica._modules:
            replica._modules[key] = None
    for name, replica in replicas.items():
        parent, _, key = name.rpartition(".")
        if name:
            replicas[parent]._modules[key] = replica
    plain(x)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 1.5
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    torch.testing.assert_close(replicas[""](x), plain(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fast.named_buffers())
    replicas[""](x).square().sum().backward()
    assert fast.block1.denselayer2.conv1.weight.grad.abs().sum() > 0


def test_inference_mode_and_second_derivatives():
    plain, fast, x = both()
    plain.eval(), fast.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x))
    twice = []
    for model in (plain, fast):
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(y).square().sum(), y, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), y)[0])
    torch.testing.assert_close(twice[1], twice[0], rtol=1e-7, atol=1e-9)


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    plain, fast, _ = both()
    inputs = [torch.randn(2, 3, 8, 7, dtype=torch.float64) for _ in range(16)]
    plain.eval(), fast.eval()
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for out, x in zip(pool.map(fast, inputs), inputs, strict=True):
            torch.testing.assert_close(out, plain(x))


def test_an_average_in_training_and_generation():
    """Calls out of order and a second pass, as they come."""
    torch.manual_seed(0)
    plain = randomise(DenseFormer(dilation=2)).double().average
    fast = dnl.accelerate(copy.deepcopy(plain))
    states = [torch.randn(2, 3, dtype=torch.float64) for _ in range(6)]
    for _ in range(2):
        for model in (plain, fast):
            model.init_accumulators(states[0])
        for i in range(5):
            torch.testing.assert_close(fast(states[i + 1], i), plain(states[i + 1], i))


def test_processes_can_be_started_with_an_accelerated_model():
    if os.name != "posix":
        pytest.skip("fork")
    plain, fast, x = both()
    fast.eval().share_memory()
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        (out,) = pool.map(_run_elsewhere, [(copy.deepcopy(CASES and fast), x)])
    torch.testing.assert_close(out, plain.eval()(x))


def _run_elsewhere(given):
    model, x = given
    with torch.no_grad():
        return model(x)
