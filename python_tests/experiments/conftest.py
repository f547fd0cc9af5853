"""Processes of their own for the tests of this folder, forked from one that has the imports done and no threads yet."""

import io
import multiprocessing
import os
import pathlib
import signal
import socket
import sys

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dnl_kernels.experiments import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import killed  # noqa: E402

PRELOAD = ["killed", "dnl_kernels.nn", "sklearn.datasets", "torch._dynamo", "matplotlib.pyplot", "rich.table"]


@pytest.fixture(scope="session")
def start():
    """start(words, **options of killed.dnl): a `dnl` command in a process.

    A shell's background job ignores SIGINT, and so would what it starts; the processes of the tests are to obey."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def started(words, **options):
        process = context.Process(target=killed.dnl, args=([str(word) for word in words],), kwargs=options)
        process.start()
        return process

    return started


@pytest.fixture(scope="session")
def together(start):
    """together(size, words): the same command on `size` ranks, as torchrun sets them up. Returns their exit codes."""

    def run(size, words, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size}
        ranks = [
            start(words, environment={**group, "RANK": rank, "LOCAL_RANK": rank}, **options) for rank in range(size)
        ]
        for process in ranks:
            process.join(120)
            process.kill()
        return [process.exitcode for process in ranks]

    return run


@pytest.fixture(scope="session")
def contents():
    """contents(folder): the tensors of the newest checkpoint there, whole."""

    def read(folder):
        buffer = io.BytesIO()
        dcp_to_torch_save(os.fspath(checkpoint.latest(folder, pytest.fail).path), buffer)
        buffer.seek(0)
        return torch.load(buffer)

    return read
