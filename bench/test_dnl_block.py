"""DenseNet blocks against plain torch: training steps and evaluation, with the bars of the CPU kernels."""

import copy
import os
from typing import NamedTuple

import pytest
import torch

from bench import comparison
from bench.comparison import DEVICE, SMOKE, Way, compiled, of_module
from bench.peers import PlainDenseBlock
from dnl_kernels.nn import DNLBlock


class Case(NamedTuple):
    layers: int
    growth: int = 6
    size: int = 32
    batch: int = 64
    channels: int = 12
    train: bool = True
    bars: tuple[float, float] = (0.0, 0.0)  # eager / ours and compile / ours that are aimed at
    slow: bool = True  # torch.compile takes minutes for it

    def flops(self) -> int:
        """Of the forward convolutions."""
        reads = sum(self.channels + i * self.growth for i in range(self.layers))
        return 2 * 9 * reads * self.growth * self.batch * self.size**2

    def bytes(self) -> int:
        """The input and every state, once: what a block that stays in cache would move."""
        return 4 * (self.channels + self.layers * self.growth) * self.batch * self.size**2


CASES = {
    "train-L4-8x8": Case(4, size=8, batch=16, slow=False),
    "train-L16": Case(16, bars=(5.0, 4.0), slow=False),
    "train-L32": Case(32, bars=(7.0, 4.3)),
    "train-L16-G12": Case(16, growth=12, bars=(3.0, 0.0)),
    "train-L32-16x16": Case(32, size=16, bars=(3.0, 0.0)),
    "train-L32-8x8": Case(32, size=8, bars=(3.0, 0.0)),
    "eval-L16": Case(16, batch=32, train=False, bars=(9.0, 6.5), slow=False),
    "eval-L32": Case(32, batch=32, train=False, bars=(7.0, 5.5)),
}


MINUTES = "compiling takes minutes (DNL_BENCH_SLOW=1 does it)"
SLOW = os.environ.get("DNL_BENCH_SLOW") == "1"


def twins(case: Case) -> tuple[DNLBlock, PlainDenseBlock]:
    """Ours and the plain block with the same parameters, in their own orders."""
    ours, plain = (kind(case.channels, case.layers, case.growth).to(DEVICE) for kind in (DNLBlock, PlainDenseBlock))
    for norm, conv, layer in zip(plain.norms, plain.convs, ours.layers, strict=True):
        norm.load_state_dict(layer.norm.state_dict())
        conv.load_state_dict(layer.affine.state_dict())
    return ours, plain


def in_order(block: torch.nn.Module, x: torch.Tensor, train: bool) -> Way:
    """The way of a block with its leaves in one order for both kinds: x, then norm and convolution layer by layer."""
    one = of_module(block, x, train=train)
    if isinstance(block, DNLBlock):
        pairs = [(layer.norm, layer.affine) for layer in block.layers]
    else:
        pairs = list(zip(block.norms, block.convs, strict=True))
    leaves = [p for norm, conv in pairs for p in (norm.weight, norm.bias, conv.weight)]
    return one._replace(leaves=[x, *leaves])


@pytest.mark.parametrize("name", CASES)
def test_dnl_block(record, name):
    case = CASES[name]
    if SMOKE:
        case = case._replace(layers=min(case.layers, 4), size=8, batch=2)
    ours, plain = twins(case)
    x = torch.randn(case.batch, case.channels, case.size, case.size, device=DEVICE).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    ways = {"ours": in_order(ours, x, case.train), "eager": in_order(plain, x, case.train)}
    twin = copy.deepcopy(plain)  # a compiled graph keeps running statistics, which another way must not change
    wanted = SLOW or not case.slow
    ways["compile"] = compiled(in_order(twin, x, case.train), lambda: twin(x)) if wanted else MINUTES
    exact = in_order(copy.deepcopy(plain).double(), exact_x, case.train)

    @torch.no_grad()
    def redraw():
        exact_x.copy_(x.normal_())

    bars = {peer: bar for peer, bar in zip(("eager", "compile"), case.bars, strict=True) if bar}
    record(comparison.Case("dnl_block", name, ways, exact, flops=case.flops(), bytes=case.bytes(), train=case.train,
                           bars=bars, redraw=redraw))  # fmt: skip
