"""The operators on a CUDA device against the strongest other ways: `python -m bench.gpu [PATTERN]` (make bench-gpu).

Ratios of median times in one process, alternating, with the peak of allocated memory beside them, and the case's floor:
max(bytes / copy rate, FLOPs / product rate), both rates measured on the same device in the same run. Losing cases are
shown too. Where there is no device it says so and ends: nothing is measured or estimated instead.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dnl_kernels as dnl
from bench import harness
from bench.test_nonlocal_attention import _augmented


class Bench(NamedTuple):
    """given: the tensors. competitors: functions of them, one for each GPU backend of ours and for each peer; bytes and
    flops: the least work of a call."""

    name: str
    given: list[Tensor]
    competitors: dict[str, Callable[..., Tensor]]
    train: bool
    bytes: int
    flops: float


def nonlocal_cases(device: str) -> Iterator[Bench]:
    sizes = ((16, 1024, 16), (16, 1024, 64), (4, 4096, 64), (4, 4096, 128), (2, 4096, 256))
    for kernel, dtype in (("softmax", torch.bfloat16), ("gaussian", torch.bfloat16), ("softmax", torch.float32)):
        for B, N, D in sizes:
            for train in (False, True):
                given = [torch.randn(B, 8, N, D, device=device, dtype=dtype, requires_grad=train) for _ in range(3)]
                name = f"nonlocal-{kernel}-B{B}-N{N}-D{D}-{str(dtype)[6:]}-{'train' if train else 'forward'}"
                words = {"kernel": kernel} | ({"bandwidth": math.sqrt(D)} if kernel == "gaussian" else {})

                def ours(*t, words=words):
                    return dnl.nonlocal_attention(*t, backend="triton", **words)

                def sdpa(*t, kernel=kernel, D=D):
                    if kernel == "gaussian":
                        return _augmented(*t, math.sqrt(D))
                    return F.scaled_dot_product_attention(*t)

                tensors, products = (11, 14) if train else (4, 4)
                flops = products * B * 8 * N * N * D
                size = given[0].numel() * given[0].element_size()
                yield Bench(name, given, {"triton": ours, "sdpa": sdpa}, train, tensors * size, flops)


def dense_sum_cases(device: str) -> Iterator[Bench]:
    for J, shape in ((12, (8, 2048, 768)), (48, (8, 2048, 768)), (24, (16, 96, 56, 56))):
        for train in (False, True):
            states = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=train) for _ in range(J)]
            weight = torch.randn(J, device=device, dtype=torch.bfloat16, requires_grad=train)

            def adds(weight, *states):
                y = weight[0] * states[0]
                for w, x in zip(weight[1:], states[1:], strict=True):
                    y = torch.addcmul(y, w, x)
                return y

            found: dict[str, Callable[..., Tensor]] = {
                backend: lambda w, *s, backend=backend: dnl.dense_sum(s, w, backend=backend)
                for backend in ("triton", "cuda")
            }
            found["adds"] = adds
            found["stack"] = lambda w, *s: torch.einsum("j,j...->...", w, torch.stack(s))
            name = f"dense_sum-J{J}-{'x'.join(map(str, shape))}-{'train' if train else 'forward'}"
            passes = 3 * J + 2 if train else J + 1
            yield Bench(name, [weight, *states], found, train, passes * 2 * states[0].numel(), 0)


def step(case: Bench, function: Callable[..., Tensor]) -> Callable[[], None]:
    def run():
        if case.train:
            output = function(*case.given)
            torch.autograd.grad(output, case.given, torch.ones_like(output))
        else:
            with torch.no_grad():
                function(*case.given)
        torch.cuda.synchronize()

    return run


def rates(device: str) -> dict[str, float]:
    """Bytes per second of a copy, and FLOP/s of a large product in each dtype."""

    def timed(call):
        def run():
            call()
            torch.cuda.synchronize()

        return harness.alternate({"": run})[""]

    big = torch.empty(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    found = {"copy": 2 * big.numel() / timed(lambda: other.copy_(big))}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        found[str(dtype)] = 2 * 8192**3 / timed(lambda a=a: a @ a)
    return found


def measure(case: Bench, rate: dict[str, float]) -> Iterator[str]:
    usable = {}
    for name, function in case.competitors.items():
        try:
            step(case, function)()
            usable[name] = function
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            yield f"{case.name:60s} {name:8s} not run: {str(error)[:100]}"
    times = harness.alternate({name: step(case, f) for name, f in usable.items()})
    floor = max(case.bytes / rate["copy"], case.flops / rate[str(case.given[0].dtype)])
    best = min(times.values())
    for name, time in times.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(case, usable[name])()
        peak = (torch.cuda.max_memory_allocated() - before) / harness.MIB
        yield (
            f"{case.name:60s} {name:8s} {time * 1e3:9.3f} ms  {time / best:5.2f}x the fastest"
            f"  {time / floor:5.2f}x the floor  peak {peak:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device here, nothing was measured")
        return
    torch.manual_seed(0)
    rate = rates("cuda")
    print(torch.cuda.get_device_name(), {name: f"{value / 1e12:.2f} T/s" for name, value in rate.items()})
    for cases in (dense_sum_cases, nonlocal_cases):
        for case in cases("cuda"):
            if arguments.pattern in case.name:
                print("\n".join(measure(case, rate)), flush=True)


if __name__ == "__main__":
    main()
