"""dnl_block against a plain network that concatenates and normalises in every layer: values, every gradient, the batch
statistics, what is kept for backward, and every error."""

import pytest
import torch

import dnl_kernels as dnl
from dnl_kernels.ops.dnl_block.api import dnl_block_with_statistics
from dnl_kernels.testing import assert_within_budget, cotangent, exactly
from dnl_kernels.testing.dnl_block import CASES, DENSE3, inputs, trainable

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(case, x0, layers, backend=None):
    """The states, the gradients by name, and the batch statistics."""
    x0 = x0.detach().requires_grad_()
    names = trainable(layers)
    layers = [{n: t.detach() for n, t in layer.items()} for layer in layers]
    leaves = [layers[i][name].requires_grad_() for i, name in names]
    parameters = [dnl.LayerParameters(**layer) for layer in layers]
    y, statistics = dnl_block_with_statistics(x0, parameters, case.config, backend=backend)
    dy = cotangent(y)
    grads = torch.autograd.grad(y, [x0, *leaves], dy, allow_unused=True)
    named = zip(["dx0", *(f"layer {i} d{name}" for i, name in names)], grads, strict=True)
    return y, {name: grad for name, grad in named if grad is not None}, statistics


@pytest.mark.parametrize("name", ["densenet-bc", "tokens-gaussian", "equation-1-batch-norm"])
def test_gradients_of_gradients_and_forward_mode(name):
    case = CASES[name]._replace(config=CASES[name].config._replace(activation="tanh"))
    x0, layers = inputs(case, torch.float64)
    names = trainable(layers)

    def function(x0, *leaves):
        replaced = [{**layer} for layer in layers]
        for (i, name), leaf in zip(names, leaves, strict=True):
            replaced[i][name] = leaf
        return dnl.dnl_block(x0, [dnl.LayerParameters(**layer) for layer in replaced], case.config)

    leaves = [x0.requires_grad_(), *(layers[i][name].requires_grad_() for i, name in names)]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def cast(x0, layers, dtype):
    return x0.to(dtype), [{n: t.to(dtype) for n, t in layer.items()} for layer in layers]


@every_case
def test_against_the_plain_network_in_float64(case):
    x0, layers = inputs(case, torch.float64)
    y, grads, statistics = run(case, x0, layers)
    exact, exact_grads, exact_statistics = run(case, x0, layers, "reference")
    torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-12)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact_grads[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert (statistics is None) == (exact_statistics is None) == (not case.config.training)
    if statistics is not None and case.batch:
        assert statistics.elements == exact_statistics.elements == case.batch * torch.Size(case.positions).numel()
        for name, found, exact in zip(statistics._fields[:2], statistics[:2], exact_statistics[:2], strict=True):
            for layer in range(case.config.num_layers if found is not None else 0):
                for start, end in case.config.spans(layer):
                    torch.testing.assert_close(found[start:end], exact[start:end], msg=lambda m, n=name: f"{n}: {m}")
        for found, exact in zip(statistics[2:6], exact_statistics[2:6], strict=True):
            torch.testing.assert_close(found, exact)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(levels, case, dtype):
    """Batch norms of 20 values amplify whatever rounding there is, most of all around a non-local N and in half
    precision: the bound of each gradient is that of its own inputs."""
    x0, layers = inputs(case, dtype)
    wide = cast(x0, layers, torch.float64)
    exact, exact_grads, _ = exactly(lambda: run(case, *wide, "reference"), dtype, dtype)
    for _ in levels():
        y, grads, _ = run(case, x0, layers)
        assert_within_budget("y", y, exact)
        assert grads.keys() == exact_grads.keys()
        for name, grad in grads.items():
            assert_within_budget(name, grad, exact_grads[name])


def kept_bytes(config, x0, parameters, backend):
    """Bytes kept for backward, each storage once, without the parameters and x0."""
    own = {t.untyped_storage().data_ptr() for p in parameters for t in p if t is not None}
    own.add(x0.untyped_storage().data_ptr())
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dnl.dnl_block(x0, parameters, config, backend=backend)
    del y
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("preactivation", [True, False])
def test_what_is_kept_grows_linearly_with_the_depth(preactivation):
    sizes = {}
    for layers in (8, 16):
        mask = tuple((True,) * (layer + 1) for layer in range(layers))
        config = dnl.BlockConfig(4, layers, 4, mask, preactivation=preactivation, training=True)
        parameters = []
        for layer in range(layers):
            tensors = {name: torch.rand(shape) for name, shape in config.shapes(layer).items()}
            parameters.append(dnl.LayerParameters(**tensors)._replace(norm_mean=None, norm_var=None))
            tensors["affine_weight"].requires_grad_()
            tensors["norm_weight"].requires_grad_()
        x0 = torch.randn(2, 4, 32, 32, requires_grad=True)
        sizes[layers] = [kept_bytes(config, x0, parameters, backend) for backend in (None, "reference")]
    ours, plain = zip(sizes[8], sizes[16], strict=True)
    assert ours[1] < 2.3 * ours[0] and plain[1] > 3 * plain[0]
    assert ours[1] < plain[1] / 4


def test_channels_last_and_strided_input():
    case = CASES["densenet"]
    x0, layers = inputs(case, torch.float64)
    expected, grads, _ = run(case, x0, layers)
    for given in (x0.to(memory_format=torch.channels_last), torch.stack([x0, x0], -1)[..., 0]):
        y, found, _ = run(case, given, layers)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(found, grads)


def test_norms_of_a_half_block_may_stay_in_float32():
    case = CASES["densenet"]
    x0, layers = inputs(case, torch.bfloat16)
    mixed = [{n: t.float() if "norm" in n else t for n, t in layer.items()} for layer in layers]
    y, grads, _ = run(case, x0, mixed)
    assert y.dtype == torch.bfloat16 and grads["layer 1 dnorm_weight"].dtype == torch.float32
    torch.testing.assert_close(y, run(case, x0, layers)[0])


CONFIG = CASES["densenet-eval"].config
CONFIG_ERRORS = [
    ({"affine": "conv5x5"}, ValueError, "affine is 'conv5x5'; expected one of conv3x3, conv1x1, linear"),
    ({"kernel": "rbf"}, ValueError, "kernel is 'rbf'; expected one of local, softmax, gaussian, dot"),
    ({"activation": "elu"}, ValueError, "activation is 'elu'"),
    ({"norm": "layer"}, ValueError, "norm is 'layer'; expected one of batch, None"),
    ({"tau": -1.0}, ValueError, "tau is -1.0; expected a number > 0"),
    ({"eps": 0.0}, ValueError, "eps is 0.0"),
    ({"growth_rate": 0}, ValueError, "growth_rate is 0; expected an integer >= 1"),
    ({"bottleneck": 0}, ValueError, "bottleneck is 0"),
    (
        {"bottleneck": 4, "affine": "conv1x1"},
        ValueError,
        "bottleneck is 4 with affine='conv1x1'; expected None: a bott",
    ),
    ({"heads": 2}, ValueError, "heads is 2; expected 1, and no other value with kernel='local'"),
    ({"head_dim": 2}, ValueError, "head_dim is 2; expected None, and no other value with kernel='local'"),
    ({"residual": True}, ValueError, "residual is True; expected None, and no other value with kernel='local'"),
    ({"kernel": "dot"}, ValueError, "head_dim is 0; expected an integer >= 1"),
    ({"connectivity": DENSE3[:2]}, ValueError, r"connectivity is rows of lengths \[1, 2\]"),
    ({"connectivity": (*DENSE3[:2], (False,) * 3)}, ValueError, r"connectivity\[2\] is without any state"),
]


@pytest.mark.parametrize("options, error, message", CONFIG_ERRORS, ids=[e[-1][:40] for e in CONFIG_ERRORS])
def test_a_bad_configuration_is_named(options, error, message):
    x0, layers = inputs(CASES["densenet-eval"], torch.float32)
    parameters = [dnl.LayerParameters(**layer) for layer in layers]
    assert dnl.dnl_block(x0, parameters, CONFIG).shape == (3, 9, 4, 5)
    with pytest.raises(error, match="dnl_block: " + message):
        dnl.dnl_block(x0, parameters, CONFIG._replace(**options))


def test_bad_tensors_are_named():
    x0, layers = inputs(CASES["densenet-eval"], torch.float32)
    good = [dnl.LayerParameters(**layer) for layer in layers]

    def refused(match, error=ValueError, x0=x0, config=CONFIG, parameters=None, **replaced):
        parameters = parameters or [good[0], good[1]._replace(**replaced), good[2]]
        with pytest.raises(error, match="dnl_block: " + match):
            dnl.dnl_block(x0, parameters, config)

    refused(r"x0 is of shape \[3, 2, 4, 5\]; expected \[B, C0, H, W\] with C0 = 3", x0=x0[:, :2])
    refused(r"x0 is of shape \[3, 4, 5\]", x0=x0[:, 0])
    refused("x0 is of type list", TypeError, x0=[1])
    refused(r"x0 is of shape \[1, 3, 1, 1\]; expected more than one value", x0=x0[:1, :, :1, :1],
            config=CONFIG._replace(training=True))  # fmt: skip
    refused("parameters is of 2 layers; expected 3", parameters=good[:2])
    refused(r"parameters\[0\] is of type dict", TypeError, parameters=layers)
    refused(r"parameters\[1\].affine_weight is None; expected a tensor of shape \[2, 5, 3, 3\]", affine_weight=None)
    refused(r"parameters\[1\].norm_mean is None", norm_mean=None)
    refused(r"parameters\[1\].norm_weight is of shape \[3\]; expected \[5\]", norm_weight=torch.zeros(3))
    refused(r"parameters\[1\].rho is given; expected None", rho=torch.zeros(1))
    refused(
        r"parameters\[1\].affine_weight is of torch.float64", TypeError, affine_weight=torch.zeros(2, 5, 3, 3).double()
    )
    refused(r"parameters\[1\].norm_mean is on meta; expected cpu", norm_mean=torch.zeros(5, device="meta"))
    refused(r"parameters\[1\].norm_mean is of type float", TypeError, norm_mean=1.0)
    half = [p._replace(norm_mean=p.norm_mean.double()) for p in good]
    refused(r"parameters\[0\].norm_mean is of torch.float64; expected torch.float32", TypeError, parameters=half)
    no_affine = [p._replace(norm_weight=None, norm_bias=None, affine_bias=None) for p in good]
    assert dnl.dnl_block(x0, no_affine, CONFIG).shape == (3, 9, 4, 5)
