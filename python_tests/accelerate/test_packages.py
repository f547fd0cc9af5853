"""The networks of the packages that people use, accelerated: small ones, with the real classes. What is not installed
(basicsr is in the extra `peers`, all others in `test`) is skipped by name; test_copies.py has the same structures
without the packages."""

import copy
import importlib
import pathlib
import sys
import types

import pytest
import torch
from compare import assert_as_good, assert_same, draws_like, everything, randomise
from torch import nn

import dnl_kernels as dnl


def torchvision_densenet(**options):
    from torchvision.models import DenseNet

    return DenseNet(8, (3, 2, 2), 12, bn_size=2, num_classes=5, **options)


def other_stem_and_head():
    model = torchvision_densenet(drop_rate=0.2)
    model.features.conv0 = nn.Conv2d(1, 12, 3, padding=1, bias=False)
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.classifier.in_features, 2))
    return model


def timm_densenet(**options):
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=(3, 2, 2), bn_size=2, num_classes=5, **options)


def timm_rdnet():
    from timm.models.rdnet import RDNet

    return RDNet(num_classes=5, growth_rates=(8,) * 3, num_blocks_list=(2,) * 3, num_init_features=16,
                 block_type=("Block", "Block", "BlockESE"), is_downsample_block=(None, True, True))  # fmt: skip


def monai_densenet(dims, **options):
    from monai.networks.nets import DenseNet

    return DenseNet(dims, 1, 3, init_features=8, growth_rate=4, block_config=(3, 2), bn_size=2, **options)


def xray_densenet():
    from torchxrayvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(3, 2, 2), num_init_features=12, bn_size=2)


def jfhealthcare_densenet():
    """Of torchxrayvision's collection of older models: the features alone, without a classifier."""
    import torchxrayvision

    folder = pathlib.Path(torchxrayvision.__file__).parent / "baseline_models" / "jfhealthcare"
    sys.path.insert(0, str(folder))  # as its own files import each other
    try:
        network = importlib.import_module("model.backbone.densenet").DenseNet
    finally:
        sys.path.remove(str(folder))
    return network(8, (3, 2, 2), "BatchNorm", 12, bn_size=2, num_classes=5)


class Encoder(nn.Module):
    """The deepest features of an encoder of segmentation_models_pytorch."""

    def __init__(self, depth=5):
        super().__init__()
        from segmentation_models_pytorch.encoders.densenet import DenseNetEncoder

        self.encoder = DenseNetEncoder(out_channels=[3, 12, 36, 34, 33, 32], depth=depth, num_init_features=12,
                                       growth_rate=8, block_config=(3, 2, 2, 2), bn_size=2)  # fmt: skip

    def forward(self, x):
        return torch.cat([features.flatten(1) for features in self.encoder(x)], 1)


def dilated_encoder():
    """As densenets are dilated for segmentation: the last transition does not pool, the last block is dilated."""
    model = torchvision_densenet()
    model.features.transition2.pool = nn.Identity()
    for module in model.features.denseblock3.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (2, 2)
    return model


# basicsr imports a module that torchvision has no more.
functional = importlib.import_module("torchvision.transforms.functional")
sys.modules.setdefault(
    "torchvision.transforms.functional_tensor", types.SimpleNamespace(rgb_to_grayscale=functional.rgb_to_grayscale)
)


def basicsr_rrdb():
    from basicsr.archs.rrdbnet_arch import RRDBNet

    return RRDBNet(3, 3, num_feat=8, num_block=1, num_grow_ch=4)


def spandrel_rrdb(**options):
    importlib.import_module("spandrel")
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    return RRDBNet(num_filters=8, num_blocks=1, **options)


def mmcv_non_local(dims, mode, sub_sample):
    from mmcv.cnn.bricks import NonLocal1d, NonLocal2d, NonLocal3d

    block = (NonLocal1d, NonLocal2d, NonLocal3d)[dims - 1]
    norm = {} if dims == 1 else {"norm_cfg": {"type": "BN" if dims == 2 else "BN3d"}}
    return nn.Sequential(block(6, sub_sample=sub_sample, mode=mode, **norm))


IMAGE, PICTURE = (2, 3, 32, 32), (1, 3, 6, 5)
# name: package, model, shape of an input, accelerated blocks, blocks that are left with a part of the reason
CASES = {
    "torchvision": ("torchvision", torchvision_densenet, IMAGE, 7, None),
    "torchvision, recomputed": ("torchvision", lambda: torchvision_densenet(memory_efficient=True), IMAGE, 7, None),
    "torchvision, dropout, stem, head": ("torchvision", other_stem_and_head, (2, 1, 16, 16), 7, None),
    "torchvision, dilated": ("torchvision", dilated_encoder, IMAGE, 6, "its pooling is Identity, not AvgPool2d"),
    "timm": ("timm", timm_densenet, IMAGE, 7, None),
    "timm, recomputed": ("timm", lambda: timm_densenet(memory_efficient=True), IMAGE, 7, None),
    "timm, dropout": ("timm", lambda: timm_densenet(proj_drop_rate=0.2), IMAGE, 7, None),
    "timm, silu": ("timm", lambda: timm_densenet(act_layer="silu"), IMAGE, 7, None),
    "timm, RDNet": ("timm", timm_rdnet, IMAGE, 0, "its layers are other than those of a dense block"),
    "monai, 1d": ("monai", lambda: monai_densenet(1), (4, 1, 48), 4, None),
    "monai, 2d": ("monai", lambda: monai_densenet(2, dropout_prob=0.2), (2, 1, 32, 32), 5, None),
    "monai, 3d": ("monai", lambda: monai_densenet(3), (2, 1, 24, 20, 22), 4, None),
    "monai, instance norm": ("monai", lambda: monai_densenet(2, norm="instance"), (2, 1, 32, 32), 3, None),
    "monai, prelu": ("monai", lambda: monai_densenet(2, act="prelu"), (2, 1, 32, 32), 3, None),
    "torchxrayvision": ("torchxrayvision", xray_densenet, (2, 1, 32, 32), 7, None),
    "torchxrayvision, jfhealthcare": ("torchxrayvision", jfhealthcare_densenet, IMAGE, 6, None),
    "segmentation_models_pytorch": ("segmentation_models_pytorch", Encoder, (2, 3, 64, 64), 8, None),
    "segmentation_models_pytorch, 3": ("segmentation_models_pytorch", lambda: Encoder(3), (2, 3, 32, 32), 8, None),
    "basicsr": ("basicsr", basicsr_rrdb, PICTURE, 3, None),
    "spandrel": ("spandrel", spandrel_rrdb, PICTURE, 3, None),
    "spandrel, plus": ("spandrel", lambda: spandrel_rrdb(plus=True), PICTURE, 0, "it has further submodules: conv1x1"),
    **{
        f"mmcv, {dims}d, {mode}{', sampled' if sub else ''}": (
            "mmcv", lambda dims=dims, mode=mode, sub=sub: mmcv_non_local(dims, mode, sub), (2, 6, *(4, 6, 4)[:dims]),
            1, None,
        )
        for dims in (1, 2, 3)
        for mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        for sub in ((False, True) if dims == 2 else (False,))
    },
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def both(name, dtype=torch.float64):
    package, make, shape, accelerated, reason = CASES[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        pytest.skip(f"{package} is not installed: {error}")
    torch.manual_seed(0)
    plain = randomise(make()).to(dtype)
    fast = copy.deepcopy(plain)
    report = dnl.accelerate(fast, report=True)
    assert len(report.accelerated) == accelerated, str(report)
    assert bool(report.refused) == (reason is not None), str(report)
    assert all(reason in given for given in report.refused.values()), str(report)
    for module in plain.modules():  # torch.utils.checkpoint counts a batch twice, an accelerated block once
        for flag in ("memory_efficient", "grad_checkpointing"):
            if getattr(module, flag, False):
                setattr(module, flag, False)
    return plain, fast, torch.randn(shape, dtype=dtype)


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equals_the_original(name, training):
    plain, fast, x = both(name)
    plain.train(training), fast.train(training)
    if "concatenation" in name:  # which mmcv cannot differentiate: it divides the output of a ReLU in place
        with torch.no_grad():
            return torch.testing.assert_close(fast(x), plain(x), rtol=1e-9, atol=1e-9)
    for _ in range(2):
        assert_same(everything(fast, x), everything(plain, x), 1e-8)
    assert list(fast.state_dict()) == list(plain.state_dict())
    other = randomise(copy.deepcopy(plain), seed=1)
    fast.load_state_dict(other.state_dict())
    plain.load_state_dict(fast.state_dict())
    assert_same(everything(fast, x), everything(other, x), 1e-8)
    assert [type(m) for m in dnl.restore(fast).modules()] == [type(m) for m in plain.modules()]


# One of each family: the others differ from it in what no dtype changes.
NARROW = (
    "torchvision", "timm, silu", "monai, 1d", "monai, 2d", "monai, 3d", "torchxrayvision",
    "segmentation_models_pytorch", "basicsr", "spandrel", "mmcv, 1d, gaussian", "mmcv, 2d, embedded_gaussian, sampled",
    "mmcv, 3d, dot_product",
)  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_float32_autocast_and_channels_last(name):
    plain, fast, x = both(name, torch.float32)
    exact = copy.deepcopy(plain).double()
    form = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    single, half = [], []
    for draw in draws_like(x, 5):
        truth = everything(copy.deepcopy(exact), draw.double())
        draw = draw.to(memory_format=form)
        runs = [everything(copy.deepcopy(m).to(memory_format=form), draw) for m in (fast, plain)]
        single.append((*runs, truth))
        with torch.autocast("cpu", torch.bfloat16):
            runs = [{"output": everything(copy.deepcopy(m), draw)["output"]} for m in (fast, plain)]
        assert runs[0]["output"].dtype == runs[1]["output"].dtype
        half.append((*runs, {"output": truth["output"]}))
    assert_as_good(single, torch.finfo(torch.float32).eps)
    assert_as_good(half, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("form", ["torchvision", "monai"])
def test_old_checkpoints(form):
    """The key patterns by which the packages rename `norm.1` to `norm1` find what they look for."""
    import re

    plain, fast, x = both("torchvision" if form == "torchvision" else "monai, 2d")
    pattern = re.compile(r"^(.*denselayer\d+(?:\.layers)?\.(?:norm|relu|conv))\.?([12])\.(.*)$")
    old = {pattern.sub(r"\1.\2.\3", key): value for key, value in plain.state_dict().items()}
    assert sum(key not in fast.state_dict() for key in old) > 20
    assert sum(bool(pattern.match(key)) for key in fast.state_dict()) == sum(bool(pattern.match(k)) for k in old)
    fast.load_state_dict({pattern.sub(r"\1\2.\3", key): value for key, value in old.items()})
    assert_same(everything(fast.eval(), x), everything(plain.eval(), x), 1e-8)


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
@pytest.mark.slow
def test_whole_networks_of_torchvision(depth):
    import torchvision

    torch.manual_seed(0)
    plain = getattr(torchvision.models, f"densenet{depth}")(weights=None)
    fast = copy.deepcopy(plain)
    report = dnl.accelerate(fast, report=True, verify=depth == 121)  # the proof takes seconds for each
    assert len(report.accelerated) == 9 and not report.refused
    layers = [block.layers for block in report if block.family == "dense block"]
    assert all(text == f"{n} of {n} layers by kernels" for text in layers for n in [text.split()[0]]), str(report)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = plain.eval().double()(x.double())
        assert (fast.eval()(x) - exact).abs().max() <= 2 * (plain.float()(x) - exact).abs().max() + 1e-5
