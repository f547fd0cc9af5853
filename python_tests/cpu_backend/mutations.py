"""Breaks the CPU kernels on purpose, one tail, term or piece at a time, and demands that their tests fail.

`python python_tests/cpu_backend/mutations.py [WORD ...]` (make mutation-check); words choose mutants by their number,
their kind or a part of their file's name. All mutants of `mutants.py` are compiled into one library, for one
instruction-set level, each behind a switch that the environment sets: `old` becomes `(dnl_mutant == k ? (new) :
(old))`. The package, the library and the tests are copied to a folder, and every selection of tests has to pass there
with no mutant chosen, or it would catch nothing.

What came of a mutant is kept in that folder with a digest of the mutant and of the file that it breaks; it is run again
when one of them has changed, or with --afresh (after a change to tests). So a run may be stopped at any time, by
--seconds for one, and goes on where it was. --markdown writes the table of all kept outcomes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(pathlib.Path(__file__).parent))
from mutants import MUTATIONS, Mutation  # noqa: E402

SWITCH = "DNL_MUTANT"  # the number of the mutant that is alive, from 1
# Included before everything; the number itself lives in module.cpp.
DECLARATION = 'extern "C" __attribute__((visibility("hidden"))) int dnl_mutant;\n'
DEFINITION = f"""
#include <cstdlib>
extern "C" {{
int dnl_mutant = std::getenv("{SWITCH}") ? std::atoi(std::getenv("{SWITCH}")) : 0;
}}
"""


def switched(number: int, mutation: Mutation) -> str:
    """The expression that is the old one unless the mutant is alive."""
    if mutation.file.endswith(".py"):
        alive = f'__import__("os").environ.get("{SWITCH}") == "{number}"'
        return f"(({mutation.new}) if {alive} else ({mutation.old}))"
    return f"(dnl_mutant == {number} ? ({mutation.new}) : ({mutation.old}))"


def mutated(text: str, path: str) -> str:
    """The source file at `path` with a switch for each of its mutants."""
    for number, mutation in enumerate(MUTATIONS, 1):
        if mutation.file == path:
            if text.count(mutation.old) != 1:
                raise ValueError(f"{path}: {text.count(mutation.old)} places match {mutation.old!r}, expected one")
            text = text.replace(mutation.old, switched(number, mutation))
    return text


def copy(target: pathlib.Path) -> None:
    """The sources, broken, and what tests need beside them; what is there and the same keeps its time, for ninja."""
    wanted: dict[str, bytes] = {}
    for name in ("csrc", "dnl_kernels", "bench", "python_tests/ops", "python_tests/conftest.py", "pyproject.toml"):
        for path in sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]:
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                wanted[str(path.relative_to(ROOT))] = path.read_bytes()
    for path in {m.file for m in MUTATIONS}:
        wanted[path] = mutated(wanted[path].decode(), path).encode()
    wanted["csrc/mutant.h"] = DECLARATION.encode()
    wanted["csrc/module.cpp"] += DEFINITION.encode()
    for folder in ("csrc", "dnl_kernels", "bench", "python_tests"):
        for path in (target / folder).rglob("*"):
            if path.is_file() and path.suffix != ".so" and str(path.relative_to(target)) not in wanted:
                path.unlink()
    for name, content in wanted.items():
        path = target / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def build(target: pathlib.Path, level: str) -> None:
    environment = {**os.environ, "DNL_ISA_LEVELS": level, "DNL_CUDA": "0"}
    environment["DNL_CXXFLAGS"] = f'-include "{target / "csrc" / "mutant.h"}"'
    command = [sys.executable, str(target / "dnl_kernels" / "_builder.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)


class Job(NamedTuple):
    """The tests `selected` of `tests`, with mutant `number` alive; 0: with none, and then they have to pass."""

    number: int
    tests: str
    selected: str

    def digest(self, level: str) -> str:
        """Of the mutant and what it breaks; its number may change."""
        mutation = MUTATIONS[self.number - 1]
        facts = [*self, level] if self.number == 0 else [*mutation, level, (ROOT / mutation.file).read_text()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class Outcome(NamedTuple):
    """caught: whether a test failed, or the process died; by: the first test that did, or what happened instead."""

    caught: bool
    by: str
    seconds: float


def run_tests(folder: pathlib.Path, job: Job) -> tuple[int, str]:
    """The exit status of pytest in a process of its own, which was forked from this one, where torch is imported
    already; and what it printed."""
    import pytest

    words = ["-x", "-p", "no:cacheprovider", "--tb=line", "-rfE", "-m", "not slow", f"python_tests/ops/{job.tests}"]
    words += ["-k", job.selected] if job.selected else []
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            status = 70
            try:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                os.environ[SWITCH] = str(job.number)
                os.environ.pop("DNL_CPU_ISA", None)
                os.chdir(folder)
                sys.path.insert(0, str(folder))
                status = int(pytest.main(words))
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read()


def run(folder: pathlib.Path, job: Job) -> Outcome:
    started = time.perf_counter()
    status, said = run_tests(folder, job)
    seconds = time.perf_counter() - started
    failed = re.search(r"^FAILED python_tests/ops/(.+?)(?: - .*)?$", said, re.MULTILINE)
    if status == 1 and failed:
        return Outcome(True, failed[1], seconds)
    if status < 0:
        return Outcome(True, f"{job.tests}: the process died of signal {-status}", seconds)
    return Outcome(
        False,
        f"{(said.strip().splitlines() or [''])[-1] if status == 0 else said[-1200:]} (exit status {status})",
        seconds,
    )


def right(job: Job, outcome: Outcome) -> bool:
    return outcome.caught if job.number else outcome.by.endswith("(exit status 0)")


def described(job: Job) -> str:
    if job.number == 0:
        return f"no mutant: {job.tests} {job.selected}"
    mutation = MUTATIONS[job.number - 1]
    return f"{job.number:2d} {mutation.file.removeprefix('csrc/'):38s} {mutation.kind:10s} {mutation.new}"


def table(kept: Mapping[str, dict], level: str) -> str:
    """The page of docs: a line for each mutant, what was broken and which test noticed."""
    found = []
    for number, m in enumerate(MUTATIONS, 1):
        outcome = kept.get(Job(number, m.tests, m.selected).digest(level))
        words = (m.file.removeprefix("csrc/").removeprefix("dnl_kernels/ops/"), m.kind, f"`{m.old}`", f"`{m.new}`")
        by = "not run" if outcome is None else f"`{outcome['by']}`" if outcome["caught"] else "**survived**"
        found.append(" | ".join((str(number), *words, by)).replace("||", "\\|\\|"))
    caught = sum(bool(line) for line in found if "survived" not in line and "not run" not in line)
    selections = {Job(0, m.tests, m.selected) for m in MUTATIONS}
    ran = [Outcome(**kept[j.digest(level)]) for j in selections if j.digest(level) in kept]
    green = sum(outcome.by.endswith("(exit status 0)") for outcome in ran)
    lines = [
        "# Mutants of the CPU kernels",
        "",
        "Written by `python python_tests/cpu_backend/mutations.py --markdown`."
        f" {caught} of {len(MUTATIONS)} mutants are caught, at the {level} level. Each is one change of one place; the",
        f"test is the first that fails. Of the {len(selections)} selections of tests {len(ran)} were run without a"
        f" mutant: {green} pass.",
        "",
        "| | file | kind | was | became | caught by |",
        "|---|---|---|---|---|---|",
        *(f"| {line} |" for line in found),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--level", help="the instruction-set level (default: the best one of this processor)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=ROOT / "build" / "mutants", help="what is kept, and where"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after that many")
    parser.add_argument("--afresh", action="store_true", help="run also what has an outcome")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the table of the outcomes that are kept there")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch._dynamo  # noqa: F401  once for all runs: most of their time otherwise

    started, level = time.perf_counter(), arguments.level
    if level is None:  # not imported here: tests import the broken copy
        code = "from dnl_kernels._extension import _C; print(_C.isa())"
        level = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        level = level.strip()
    jobs = [
        Job(number, m.tests, m.selected) for number, m in enumerate(MUTATIONS, 1)
        if not arguments.words or any(word in (m.kind, str(number)) or word in m.file for word in arguments.words)
    ]  # fmt: skip
    jobs += dict.fromkeys(job._replace(number=0) for job in jobs)
    file = arguments.folder / "outcomes.json"
    kept: dict[str, dict] = json.loads(file.read_text()) if file.is_file() else {}
    waiting = [job for job in jobs if arguments.afresh or job.digest(level) not in kept]
    if waiting and arguments.seconds > 0:
        copy(arguments.folder)
        build(arguments.folder, level)

    def one(job: Job) -> None:
        if time.perf_counter() - started > arguments.seconds:
            return
        outcome = run(arguments.folder, job)
        kept[job.digest(level)] = outcome._asdict()
        temporary = file.with_suffix(f".{job.number}.tmp")
        temporary.write_text(json.dumps(dict(kept), indent=1))
        temporary.replace(file)
        word = (
            ("caught  " if job.number else "green   ")
            if right(job, outcome)
            else "SURVIVED"
            if job.number
            else "RED     "
        )
        print(f"{word} {outcome.seconds:4.0f} s {described(job)}\n{'':16s} {outcome.by}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(one, waiting))
    found = [(job, Outcome(**kept[job.digest(level)])) for job in jobs if job.digest(level) in kept]
    wrong = [job for job, outcome in found if not right(job, outcome)]
    for job in wrong:
        print("not as it should be:", described(job))
    if arguments.markdown:
        arguments.markdown.write_text(table(kept, level))
    mutants = [job for job in jobs if job.number]
    caught = sum(outcome.caught for job, outcome in found if job.number)
    print(f"{caught} of {len(mutants)} mutants of the CPU kernels were caught ({level})")
    if left := len(jobs) - len(found):
        print(f"{left} runs are left")
    sys.exit(bool(wrong) or left > 0)


if __name__ == "__main__":
    main()
