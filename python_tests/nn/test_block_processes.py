"""A fused block among threads, after a fork, in DataLoader workers, and over many steps."""

import multiprocessing
import pathlib
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dnl_kernels.nn import DNLBlock


def step(block, x):
    """The states and every gradient."""
    leaf = x.clone().requires_grad_()
    states = block(leaf)
    return [states.detach(), *torch.autograd.grad(states.square().sum(), [leaf, *block.parameters()])]


def block(**options):
    return DNLBlock(3, 4, 6, track_running_stats=False, **options)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bottleneck", [None, 2])
def test_several_python_threads_at_once(bottleneck):
    """Blocks and sizes differ between the threads, so that shared working memory would show."""
    work = [(block(bottleneck=bottleneck), torch.randn(2 + i, 3, 9 + 3 * i, 8)) for i in range(4)]
    expected = [step(*w) for w in work]
    failed = []

    def run(i):
        for _ in range(5):
            if not equal(step(*work[i]), expected[i]):
                failed.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def _in_child(module, x, expected, queue):
    torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads do not survive a fork
    with torch.no_grad():
        queue.put(torch.equal(module(x), expected))


def test_after_a_fork():
    module, x = block(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = module(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(module, x, expected, queue))
    child.start()
    assert queue.get(timeout=60)
    child.join()
    assert child.exitcode == 0


class Transformed(Dataset):
    def __init__(self, module, images):
        self.module, self.images = module, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(self.images[i : i + 1])[0]


def test_in_the_workers_of_a_dataloader():
    module, images = block().eval(), torch.randn(6, 3, 8, 8)
    dataset = Transformed(module, images)
    expected = torch.stack([dataset[i] for i in range(6)])
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), expected)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="Linux says how much memory is resident")
@pytest.mark.parametrize("bottleneck", [None, 2])
def test_memory_does_not_grow_over_a_thousand_steps(bottleneck):
    module, x = DNLBlock(2, 1, 2, bottleneck=bottleneck, track_running_stats=False), torch.randn(2, 2, 16, 16)
    for _ in range(100):
        step(module, x)
    before = resident()
    for _ in range(1000):
        step(module, x)
    assert resident() - before < 2**21  # a leak of the states would be 8 MiB


def test_set_num_threads_is_obeyed():
    """One thread per process means no other thread computes: the process's time does not pass the wall's."""
    import time

    module, x = block(), torch.randn(32, 3, 32, 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step(module, x)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(3):
            step(module, x)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        torch.set_num_threads(threads)
    assert cpu < 1.2 * wall
