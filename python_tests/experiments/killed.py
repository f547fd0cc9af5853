"""What the tests of interrupted runs start in processes of their own; under torchrun, one whose rank 1 is killed."""

import os
import pathlib
import resource
import signal
import sys

from dnl_kernels.experiments import cli, metrics, run, train  # noqa: F401  (train: imported before the fork)
from dnl_kernels.experiments.checkpoint import os as checkpoint_os


def dnl(words, kill_at=None, environment=None, output=None, largest=None):
    """Runs a command. kill_at = n: the process kills itself around the n-th time that it touches a file. output: a file
    for what it prints. largest: no file may become larger, as on a disk that is full.
    """
    count = 0
    os.environ.update({name: str(value) for name, value in (environment or {}).items()})
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    def event():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def wrapped(*args, **kwargs):
            event()
            result = function(*args, **kwargs)
            event()
            return result

        return wrapped

    def half_a_line(path, record):
        """An append that may be killed in the middle."""
        line = metrics.line(record)
        with path.open("a") as file:
            for part in (line[:20], line[20:]):
                file.write(part)
                file.flush()
                event()

    if kill_at is not None:
        checkpoint_os.fsync, checkpoint_os.replace = around(os.fsync), around(os.replace)
        pathlib.Path.rename, pathlib.Path.mkdir = around(pathlib.Path.rename), around(pathlib.Path.mkdir)
        metrics.append = half_a_line
    code = cli.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill_rank_1_in_epoch_2():
    """Unless torchrun has restarted the group already."""
    epoch = run.Run.epoch

    def killed(self, number, *args):
        if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return epoch(self, number, *args)

    run.Run.epoch = killed


if __name__ == "__main__":
    kill_rank_1_in_epoch_2()
    sys.exit(cli.main())
