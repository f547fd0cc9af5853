"""`python3 -m bench.gpu_day`: the plan of the day. See the package's docstring."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import platform
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu_day import summary
from bench.gpu_day.day import ROOT, Day, rows

STAGES = ("build", "look", "tests", "sanitizers", "beyond", "bench")
BUILD_SECONDS, LOOK_SECONDS, TEST_SECONDS, SANITIZER_SECONDS, BEYOND_SECONDS = 110, 60, 240, 150, 60
BENCH_SHARE = 0.4  # of the day is kept for the benchmarks
RESTARTS = 6  # of one part of the tests
SHARDS = {"nonlocal_attention:triton": 5, "dense_conv2d:triton": 2, "dnl_block:triton": 2, "dnl_layer:triton": 2}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
GROUPS = ("attention", "dense_sum", "dense_conv2d", "dnl_block", "network", "dnl_layer", "dense_linear")


def chosen(only: Sequence[str], stage: str, name: str = "") -> bool:
    """Whether `--only` wants this: each of its words is a stage, or stage:text for the parts whose names have the
    text."""
    for word in only or STAGES:
        head, _, text = word.partition(":")
        if head == stage and (not name or text in name):
            return True
    return False


class Plan:
    def __init__(self, day: Day, only: Sequence[str], rehearse: bool, workers: int):
        self.day, self.only, self.rehearse, self.workers = day, only, rehearse, workers
        self.facts: dict[str, Any] = {}
        self.folder = "python_tests/gpu"
        wanted = [stage for stage in STAGES if chosen(only, stage)]
        self.reserve = BENCH_SHARE * day.seconds if "bench" in wanted and len(wanted) > 1 else 0.0
        if rehearse:
            day.environment["DNL_GPU_TESTS"] = "emulated"

    def page(self) -> None:
        with self.day.lock:
            summary.write(self.day.results, self.day.out)

    def look_around(self) -> None:
        ended = self.day.module("facts", "bench.gpu_day.facts", limit=60)
        if line := re.search(r"^FACTS (.*)$", ended.text, re.MULTILINE):
            self.facts = json.loads(line[1])

    def prepare(self) -> None:
        """The libraries, carried or built for this card, and what there is to test. A rehearsal builds the emulator."""
        self.look_around()
        if self.rehearse:
            code = "from dnl_kernels.testing import cuda_emulator; cuda_emulator.build()"
            self.day.step("build", [sys.executable, "-c", code], limit=BUILD_SECONDS)
        elif chosen(self.only, "build") and (not self.facts or {"cpu", "cuda"} & set(self.facts["missing"])):
            level = "avx2" if platform.machine() in ("x86_64", "AMD64") else "generic"
            env = {"DNL_ISA_LEVELS": level}  # the processor's kernels are nobody's subject here
            if capability := self.facts.get("capability"):
                env["DNL_CUDA_ARCH_LIST"] = capability
            builder = str(ROOT / "dnl_kernels" / "_builder.py")
            self.day.step("build", [sys.executable, builder], limit=BUILD_SECONDS, env=env)
            self.look_around()
        self.day.write("facts", rehearsal=self.rehearse, **self.facts)

    def part(self, part: str, shard: str, look: bool, reserve: float, limit: float = TEST_SECONDS) -> None:
        """One part of the tests, in as many processes as it takes."""
        name = f"{'look' if look else 'tests'} {part}" + ("" if look else f" {shard}")
        # Alone in their process, tests compile graphs at the same time as others: each with few threads.
        env = {"DNL_DAY_PART": part, "DNL_DAY_SHARD": shard, "DNL_DAY_LOOK": str(int(look)), "OMP_NUM_THREADS": "2",
               "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # fmt: skip
        if self.rehearse and part.endswith(":triton"):
            env["TRITON_INTERPRET"] = "1"
        hang = ["--timeout=90"] if "pytest_timeout" in self.facts.get("plugins", ()) else []
        plugins = ["-p", "bench.gpu_day.plugin", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", self.folder, "-q", "--tb=short", *plugins, *hang]
        for attempt in range(RESTARTS):
            ended = self.day.step(name + (f" #{attempt + 1}" if attempt else ""), command, limit, reserve, env)
            culprits = self._unfinished(part, shard)
            for test in culprits:  # at the limit the step was ended from outside: nobody's fault
                outcome = "unfinished" if ended.code == 124 else "crashed"
                self.day.write("test", test=test, part=part, shard=shard, outcome=outcome, seconds=None,
                               why=f"the process ended with {ended.code}: {ended.text[-300:]}")  # fmt: skip
            if ended.code in (None, 0, 1, 5, 124) and not (culprits and ended.code != 124):
                return

    def _unfinished(self, part: str, shard: str) -> list[str]:
        """What was started more often than it ended."""
        mine = [r for r in rows(self.day.results) if (r.get("part"), r.get("shard")) == (part, shard)]
        started, ended = (
            collections.Counter(r["test"] for r in mine if r["kind"] == kind) for kind in ("start", "test")
        )
        return list(started - ended)

    def _only_ours(self) -> list[str]:
        """The option that leaves other kernels alone: its name differs between versions."""
        told = self.day.step("sanitizer help", ["compute-sanitizer", "--help"], limit=20).text
        return next(([name, "kns=dnl"] for name in ("--kernel-name", "--kernel-regex") if name in told), [])

    def sanitizer(self, tool: str, reserve: float) -> None:
        script = [sys.executable, "-m", "bench.gpu_day.sanitize"]
        if not self.rehearse:
            words = ["--tool", tool, *self._only_ours(), "--print-limit", "20", "--error-exitcode", "86"]
            script = ["compute-sanitizer", *words, *script]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
        ended = self.day.step(f"sanitizer {tool}", script, SANITIZER_SECONDS, reserve, env)
        told = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", ended.text)
        calls = len(re.findall(r"^ok ", ended.text, re.MULTILINE))
        failed = re.findall(r"^FAILED (.*)$", ended.text, re.MULTILINE)
        self.day.write(
            "sanitizer", tool=tool, code=ended.code, calls=calls, failed=failed, summary=told[-1] if told else ""
        )
        with self.day.lock, open(self.day.out / "sanitizer.txt", "a") as file:
            file.write(f"===== {tool}\n{ended.text[-200_000:]}\n")

    def together(self, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            for future in concurrent.futures.as_completed([pool.submit(call, *given) for call, given in jobs]):
                if error := future.exception():
                    self.day.write("step", name="driver", code=1, seconds=None, tail=repr(error))
                self.page()

    def tests(self) -> None:
        parts = self.facts.get("parts", [])
        if looks := [part for part in parts if chosen(self.only, "look", part)]:
            reserve = max(self.reserve, self.day.left() - LOOK_SECONDS)
            self.together([(self.part, (part, "0/1", True, reserve)) for part in looks])
        jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        if self.rehearse or self.facts.get("sanitizer"):
            tools = [tool for tool in (TOOLS[:1] if self.rehearse else TOOLS) if chosen(self.only, "sanitizers", tool)]
            jobs += [(self.sanitizer, (tool, self.reserve + BEYOND_SECONDS)) for tool in tools]
        for part in [part for part in [*parts, "rest"] if chosen(self.only, "tests", part)]:
            shards = SHARDS.get(part, 1) if not self.rehearse else 1
            jobs += [(self.part, (part, f"{i}/{shards}", False, self.reserve + BEYOND_SECONDS)) for i in range(shards)]
        self.together(jobs)
        if chosen(self.only, "beyond"):
            self.part("beyond", "0/1", False, self.reserve, 2 * BEYOND_SECONDS)
            self.page()

    def benchmarks(self) -> None:
        """A group after the other; each has an equal share of the time that is left when it starts."""
        groups = [group for group in GROUPS if chosen(self.only, "bench", group)]
        for i, group in enumerate(groups):
            share = (self.day.left() - 5) / (len(groups) - i)
            self.day.module(f"bench {group}", "bench.gpu_day.groups", group, limit=share, env={"OMP_NUM_THREADS": "8"})
            self.page()

    def run(self) -> None:
        self.prepare()
        self.page()
        device = "device" not in self.facts.get("missing", {"device": ""})
        if device:
            self.tests()
            self.benchmarks()
        self.day.write("end", complete=device)
        self.page()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-day", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=470, help="for everything")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE[:TEXT]", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", default=os.environ.get("OUT") or str(ROOT / "out" / "gpu-day"))
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 4) - 2), help="processes at a time")
    parser.add_argument("--rehearse", action="store_true", help="on the processor: emulator, interpreter, toy sizes")
    parser.add_argument("--clock", type=float, default=1.0, help="how much faster than the wall's the day's clock runs")
    options = parser.parse_args(arguments)
    for word in options.only:
        if word.partition(":")[0] not in STAGES:
            parser.error(f"--only is {word!r}; expected one of {', '.join(STAGES)}, with :text behind it or not")
    if options.seconds <= 0 or options.clock <= 0 or options.workers < 1:
        parser.error("--seconds and --clock must be positive, --workers at least 1")
    day = Day(pathlib.Path(options.out).resolve(), options.seconds, options.clock)
    plan = Plan(day, options.only, options.rehearse, options.workers)

    def terminated(*_: object) -> None:  # a limit around this one
        day.abort()
        summary.write(day.results, day.out)
        os._exit(143)

    signal.signal(signal.SIGTERM, terminated)
    plan.run()
    print(summary.render(rows(day.results)))
    return summary.verdict(rows(day.results))


if __name__ == "__main__":
    sys.exit(main())
