"""The benchmarks of a GPU day: `python3 -m bench.gpu_day.groups GROUP`. Sizes are those that GPUs are used for.

Each group is a generator of (case, tf32): a case is made when its turn comes, and its tensors are gone after it.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dnl_kernels as dnl
from bench.comparison import Case, Way, of_module, way
from bench.gpu_day import day, measure
from bench.peers import PlainDenseBlock, dense_sums_eager
from dnl_kernels._activations import activate
from dnl_kernels.testing import dense_conv2d, dense_linear, dense_sum, dnl_layer

GPU = measure.GPU
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16
OWN = ("cuda", "triton") if GPU else ("cpu",)
Cases = Iterator[tuple[Case, bool]]
NOT_COMPILED = "torch.compile takes minutes for a training step of a whole network: see the blocks"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def name(dtype: torch.dtype, *words: object) -> str:
    return "-".join(map(str, (*words, str(dtype).removeprefix("torch."))))


def backends(op: str, function: Callable[..., Tensor], given: list[Any]) -> dict[str, Way | str]:
    """Ours, a way for each backend of the operator, and eager PyTorch."""
    from dnl_kernels import _backend

    own = [b for b in OWN if b in _backend.SUPPORTS[op]]
    found: dict[str, Way | str] = {b: way(functools.partial(function, backend=b), given) for b in own}
    return found | {"eager": way(functools.partial(function, backend="reference"), given)}


def exactly(function: Callable[..., Tensor], given: list[Any]) -> Way:
    return way(functools.partial(function, backend="reference"), [None if t is None else t.double() for t in given])


def _sdpa(backend: str) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def attention() -> Cases:
    from torch.nn.attention.flex_attention import flex_attention

    shapes = [(4, 16, 4096, 64), (2, 16, 16384, 128), (1, 8, 65536, 64), (8, 8, 4096, 32)] if GPU else [(2, 2, 64, 16)]
    for B, h, N, D in shapes:
        for dtype in (HALF, torch.float32):
            if dtype == torch.float32 and N > 16384:
                continue
            given: list[Any] = [torch.randn(B, h, N, D, device=DEVICE).to(dtype) for _ in range(3)]
            kinds = (
                ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
                if dtype == HALF
                else ("EFFICIENT_ATTENTION",)
            )
            found: dict[str, Way | str] = {
                "ours": way(dnl.nonlocal_attention, given),
                "ours, gaussian": way(functools.partial(dnl.nonlocal_attention, kernel="gaussian", bandwidth=D**0.5),
                                      given, same=False),
                "sdpa": way(F.scaled_dot_product_attention, given),
            }  # fmt: skip
            if GPU:
                found |= {f"sdpa {kind.split('_')[0].lower()}": way(_sdpa(kind), given) for kind in kinds}
                found["flex"] = way(compiled(flex_attention), given)
            small = B * h * N * N <= 2**31
            if small:
                found["eager"] = way(functools.partial(dnl.nonlocal_attention, backend="reference"), given)
            exact = way(F.scaled_dot_product_attention, [t.double() for t in given]) if small else None
            moved = 4.0 * B * h * N * D * given[0].element_size()
            case = Case("attention", name(dtype, f"B{B}", f"h{h}", f"N{N}", f"D{D}"), found, exact,
                        flops=4.0 * B * h * N * N * D, bytes=moved, backward_flops=2.5)  # fmt: skip
            yield case, False
            if dtype == torch.float32:
                yield case._replace(name=case.name + "-tf32"), True


def sums() -> Cases:
    layers, shape = (64, (4096, 4096)) if GPU else (6, (8, 16))
    yield _triangle(layers, shape, HALF)
    sizes = dense_sum.SIZES | {
        "transformer": dense_sum.Case((32, 1024, 768), 12, -1), "densenet-7x7": dense_sum.Case((64, 512, 7, 7), 16, 1)
    }  # fmt: skip
    if not GPU:
        sizes = {"small": dense_sum.Case((2, 8, 16), 4, -1)}
    for title, size in sizes.items():
        for dtype in (HALF, torch.float32):
            weight, states = dense_sum.inputs(size, dtype, DEVICE)
            dim = -1 if size.channel_dim is None else size.channel_dim

            def call(weight, *states, backend=None, dim=dim):
                return dnl.dense_sum(states, weight, channel_dim=dim, backend=backend)

            def plain(weight, *states, dim=dim, size=size):
                shape = [-1 if d == dim % len(size.shape) else 1 for d in range(len(size.shape))]
                rows = weight.unbind() if size.channel_dim is None else [w.view(shape) for w in weight]
                return functools.reduce(torch.add, (w * x for w, x in zip(rows, states, strict=True)))

            given = [weight, *states]
            found = backends("dense_sum", call, given) | {"eager in the type": way(plain, given)}
            if GPU:
                found["compile"] = way(compiled(functools.partial(call, backend="reference")), given)
            count, numel = len(states), states[0].numel()
            yield Case("dense_sum", name(dtype, title), found, exactly(call, given), flops=2.0 * count * numel,
                       bytes=float((count + 1) * numel * weight.element_size()), backward_flops=2.0), False  # fmt: skip


def _triangle(layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Case, bool]:
    """All sums y_l = sum_{j <= l} w_lj x_j of a network of `layers`, as DenseSum streams them."""
    weight = (torch.randn(layers, layers) / layers).to(DEVICE, dtype)
    states = [torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(layers)]
    mix = dnl.DenseSum(layers, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        mix.weight.copy_(weight)
    leaves = [x.requires_grad_() for x in states]

    def streamed():
        history = mix.history(leaves[0])
        total = mix(history)
        for x in leaves[1:]:
            history.append(x)
            total = total + mix(history)
        return total

    def by_hand(weight, *states):
        return functools.reduce(torch.add, dense_sums_eager(states, weight))

    twin = weight.clone().requires_grad_()
    found: dict[str, Way | str] = {
        "ours": Way(streamed, [mix.weight, *leaves], [mix.weight]),
        "eager": Way(lambda: by_hand(twin, *leaves), [twin, *leaves], [twin]),
    }
    pairs, numel = layers * (layers + 1) // 2, states[0].numel()
    case = Case("DenseSum", name(dtype, f"triangle-L{layers}", *shape), found, None, flops=2.0 * pairs * numel,
                bytes=2.0 * layers * numel * weight.element_size())  # fmt: skip
    return case, False


def convolutions() -> Cases:
    sizes = {  # a layer of densenet121 at B = 64, the paper's network at B = 512
        "densenet121-1x1": dense_conv2d.Case(64, (64, *(32,) * 5), 56, 56, 128, size=1, bias=False),
        "densenet121-3x3": dense_conv2d.Case(64, (128,), 56, 56, 32, bias=False),
        "densenet121-3x3-14": dense_conv2d.Case(64, (128,), 14, 14, 32, bias=False),
        "paper-growth-12": dense_conv2d.Case(512, (24, *(12,) * 8), 32, 32, 12, bias=False),
        "paper-growth-6": dense_conv2d.Case(512, (12, *(6,) * 12), 16, 16, 6, bias=False),
    } if GPU else {"small": dense_conv2d.Case(2, (4, 4), 8, 8, 4, bias=False)}  # fmt: skip
    for title, size in sizes.items():
        for dtype, tf32 in ((HALF, False), (torch.float32, False), (torch.float32, True)):
            p, states = dense_conv2d.inputs(size, dtype, DEVICE)
            given = [t for t in p if t is not None] + states

            def call(weight, scale, shift, *states, backend=None, size=size):
                words = {"norm_scale": scale, "norm_shift": shift, "activation": size.activation, "backend": backend}
                return dnl.dense_conv2d(states, weight, **words)

            def plain(
                weight, scale, shift, *states, size=size
            ):  # what is written for a half type: all of it in that type
                x = torch.relu(torch.cat(states, 1) * scale[:, None, None] + shift[:, None, None])
                return F.conv2d(x, weight, padding=size.size // 2)

            def last(weight, scale, shift, *states, plain=plain):
                to = torch.channels_last
                return plain(
                    weight.contiguous(memory_format=to), scale, shift, *(x.contiguous(memory_format=to) for x in states)
                )

            found: dict[str, Way | str] = backends("dense_conv2d", call, given)
            found |= {"eager in the type": way(plain, given), "channels last": way(last, given)}
            if size.outputs > 32:
                found.pop("cuda", None)
            if GPU:
                found["compile"] = way(compiled(plain), given)
            pixels, channels = size.batch * size.height * size.width, sum(size.channels)
            yield Case("dense_conv2d", name(dtype, title) + "-tf32" * tf32, found, exactly(call, given),
                       flops=2.0 * pixels * channels * size.outputs * size.size**2,
                       bytes=float(pixels * (channels + size.outputs) * states[0].element_size())), tf32  # fmt: skip


def layers() -> Cases:
    sizes = {n: c._replace(batch=16 * c.batch) for n, c in dnl_layer.SIZES.items()}
    if not GPU:
        sizes = {"small": dnl_layer.CASES["softmax"]}
    for title, size in sizes.items():
        for dtype in (HALF, torch.float32):
            states, tensors = dnl_layer.inputs(size, dtype)
            names, given = list(tensors), [t.to(DEVICE) for t in (*tensors.values(), *states)]

            def call(*leaves, backend=None, size=size, names=names):
                named = dict(zip(names, leaves, strict=False))
                return dnl_layer.call(size, list(leaves[len(names) :]), named, backend)

            found = backends("dnl_layer", call, given)
            if GPU and size.kernel == "local":
                found.pop("cuda", None)
            if GPU:
                found["compile"] = way(compiled(functools.partial(call, backend="reference")), given)
            moved = float(sum(t.numel() for t in given[len(names) :]) * given[0].element_size())
            yield Case("dnl_layer", name(dtype, title), found, exactly(call, given), bytes=moved), False


def blocks() -> Cases:
    from bench.test_dnl_block import in_order

    def _block(block: torch.nn.Module, x: Tensor, train: bool, call: Callable[[], Tensor] | None = None) -> Way:
        """With its leaves in one order for both kinds of block. call: in place of the block's own."""
        one = in_order(block, x, train) if train else of_module(block, x, train=False)
        return one._replace(call=call or one.call)

    for depth, growth, size, batch in [(16, 12, 32, 256), (32, 6, 16, 512)] if GPU else [(2, 4, 8, 2)]:
        for dtype, tf32 in ((HALF, False), (torch.float32, False), (torch.float32, True)):
            ours, plain = (kind(12, depth, growth).to(DEVICE, dtype) for kind in (dnl.DNLBlock, PlainDenseBlock))
            for norm, conv, layer in zip(plain.norms, plain.convs, ours.layers, strict=True):
                norm.load_state_dict(layer.norm.state_dict())
                conv.load_state_dict(layer.affine.state_dict())
            x = torch.randn(batch, 12, size, size, device=DEVICE, dtype=dtype).requires_grad_()
            last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            reads = sum(12 + i * growth for i in range(depth))
            for train in (True, False):
                found: dict[str, Way | str] = {
                    "ours": _block(copy.deepcopy(ours), x, train), "eager": _block(copy.deepcopy(plain), x, train),
                    "channels last": _block(copy.deepcopy(plain).to(memory_format=torch.channels_last), last, train),
                }  # fmt: skip
                if GPU:
                    twin = copy.deepcopy(plain)
                    found["compile"] = _block(twin, x, train, functools.partial(compiled(twin), x))
                exact = _block(copy.deepcopy(plain).double(), x.detach().double().requires_grad_(), train)
                title = f"L{depth}-G{growth}-{size}x{size}-B{batch}-{'train' if train else 'eval'}"
                yield Case("dnl_block", name(dtype, title) + "-tf32" * tf32, found, exact, train=train,
                           flops=2.0 * 9 * reads * growth * batch * size**2,
                           bytes=float((12 + depth * growth) * batch * size**2 * x.element_size())), tf32  # fmt: skip


def networks() -> Cases:
    from bench.test_networks import loss_way, plain
    from dnl_kernels.nn import DNLNet, accelerate

    settings = ((HALF, False), (torch.float32, False), (torch.float32, True))
    depth, batch, size = (16, 512, 32) if GPU else (2, 2, 8)
    for dtype, tf32 in settings:
        network = DNLNet.paper(num_layers=depth).to(DEVICE, dtype)
        x = torch.rand(batch, 3, size, size, device=DEVICE, dtype=dtype)
        twin = plain(network).to(DEVICE, dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        found: dict[str, Way | str] = {
            "ours": loss_way(network, x), "eager": loss_way(twin, x),
            "channels last": loss_way(copy.deepcopy(twin).to(memory_format=torch.channels_last), last),
            "compile": NOT_COMPILED,
        }  # fmt: skip
        yield Case("network", name(dtype, f"paper-L{depth}-B{batch}") + "-tf32" * tf32, found), tf32
    import torchvision

    for title in ("densenet121", "densenet161"):
        for dtype, tf32 in settings:
            batch, size = (64, 224) if GPU else (2, 32)
            model = getattr(torchvision.models, title)(num_classes=10).to(DEVICE, dtype)
            x = torch.randn(batch, 3, size, size, device=DEVICE, dtype=dtype)
            last = x.contiguous(memory_format=torch.channels_last)
            found = {
                "ours": loss_way(accelerate(copy.deepcopy(model)), x), "torchvision": loss_way(model, x),
                "channels last": loss_way(copy.deepcopy(model).to(memory_format=torch.channels_last), last),
                "compile": NOT_COMPILED,
            }  # fmt: skip
            yield Case("network", name(dtype, f"{title}-B{batch}-{size}") + "-tf32" * tf32, found), tf32
            if not GPU:
                break


def linear() -> Cases:
    sizes = {n: c._replace(shape=(8 * c.shape[0], *c.shape[1:])) for n, c in dense_linear.SIZES.items()} if GPU else {
        "small": dense_linear.CASES["gelu"]}  # fmt: skip
    for title, size in sizes.items():
        for dtype, tf32 in ((HALF, False), (torch.float32, False), (torch.float32, True)):
            tensors: dict[str, Any] = dense_linear.inputs(size, dtype, DEVICE)
            states = tensors.pop("states")
            given = [*tensors.values(), *states]

            def call(weight, bias, scale, shift, *states, backend=None, size=size):
                words = {"activation": size.activation, "scale": size.scale, "backend": backend}
                return dnl.dense_linear(states, weight, bias, norm_scale=scale, norm_shift=shift, **words)

            def plain(weight, bias, scale, shift, *states, size=size):
                x = torch.cat(states, -1)
                x = activate(x if scale is None else x * scale + shift, size.activation)
                return F.linear(x, size.scale * weight, bias)

            found = backends("dense_linear", call, given) | {"eager in the type": way(plain, given)}
            if GPU:
                found["compile"] = way(compiled(plain), given)
            rows, channels = states[0].numel() // states[0].shape[-1], sum(size.channels)
            yield Case("dense_linear", name(dtype, title) + "-tf32" * tf32, found, exactly(call, given),
                       flops=2.0 * rows * channels * size.width,
                       bytes=float(rows * (channels + size.width) * states[0].element_size())), tf32  # fmt: skip


GROUPS: dict[str, Callable[[], Cases]] = {
    "attention": attention, "dense_sum": sums, "dense_conv2d": convolutions, "dnl_block": blocks, "network": networks,
    "dnl_layer": layers, "dense_linear": linear,
}  # fmt: skip


def main(group: str) -> None:
    torch.manual_seed(0)
    path = os.environ.get(day.RESULTS, "/dev/stdout")
    measured = measure.Measured(group, path, float(os.environ.get("DNL_DAY_SECONDS", "60")) - 5)
    for case, tf32 in GROUPS[group]():
        measured.case(case, tf32)
        if measured.left() <= 0:
            measured.write(case="the rest", way="all", error="no time was left")
            break


if __name__ == "__main__":
    main(sys.argv[1])
