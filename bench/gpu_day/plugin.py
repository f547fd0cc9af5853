"""A pytest plugin: one part of the tests, a line as each starts and ends, and an end at a broken CUDA context.

DNL_DAY_PART: "<operator>:<backend>", "beyond", or "rest". DNL_DAY_SHARD: "i/n". DNL_DAY_LOOK=1: two named cases of
each dtype only. Tests that have an outcome in the file of results are left out: a process that is started again goes
on.
"""

from __future__ import annotations

import collections
import os
import re
import zlib

import pytest

from bench.gpu_day import day

PATH = os.environ[day.RESULTS]
PART, SHARD = os.environ["DNL_DAY_PART"], os.environ.get("DNL_DAY_SHARD", "0/1")
LOOK = os.environ.get("DNL_DAY_LOOK") == "1"
BROKEN_CONTEXT, ORPHANED = 77, 78  # the exit status
# Errors after which every call of this process fails.
STICKY = re.compile(
    r"illegal memory access|illegal address|misaligned address|illegal instruction|unspecified launch failure|"
    r"device-side assert|hardware stack error|invalid device context|invalid program counter|launch timed out"
)
# What tells most comes first, what compiles graphs last.
ORDER = (
    "test_named", "test_registered", "test_large", "test_beyond", "test_results", "test_another", "test_a_training",
    "test_tf32", "test_the_default", "test_devices", "test_opcheck", "test_compiled",
)  # fmt: skip


def part_of(nodeid: str) -> str:
    if "test_beyond" in nodeid:
        return "beyond"
    found = re.search(r"\[(\w+?)-(cuda_emulated|cuda|triton)[-\]]", nodeid)
    return f"{found[1]}:{found[2]}" if found else "rest"


LOOKS = 2  # named cases of each dtype
_looked_at: collections.Counter[str] = collections.Counter()  # dtype -> cases that ran, whatever came of it


def _dtype(item: pytest.Item) -> str:
    return item.nodeid.rpartition("-")[2].rstrip("]")


def _for_a_look(item: pytest.Item) -> bool:
    return "test_named_cases" in item.nodeid and "empty" not in item.nodeid


def pytest_collection_modifyitems(config, items):
    index, count = map(int, SHARD.split("/"))
    # What the limit ended is tried again, when a day is continued.
    done = {row["test"] for row in day.rows(PATH) if row["kind"] == "test" and row["outcome"] != "unfinished"}
    mine = [item for item in items if part_of(item.nodeid) == PART]
    mine = [item for item in mine if not LOOK or _for_a_look(item)]
    kept = [i for i in mine if i.nodeid not in done and zlib.crc32(i.nodeid.encode()) % count == index]
    kept.sort(key=lambda item: next((i for i, name in enumerate(ORDER) if name in item.nodeid), len(ORDER)))
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


DRIVER = os.getppid()


def pytest_runtest_logstart(nodeid, location):
    if os.getppid() != DRIVER:
        pytest.exit("the driver of the day is gone: nobody would end this process", returncode=ORPHANED)
    day.append(PATH, kind="start", test=nodeid, part=PART, shard=SHARD)


def pytest_runtest_protocol(item, nextitem):
    """A look ends with two cases of a dtype that the backend did not refuse: the others are for the tests' turn."""
    return True if LOOK and _looked_at[_dtype(item)] >= LOOKS else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    _looked_at[_dtype(item)] += report.when == "call" and report.outcome != "skipped"
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        why = "" if report.outcome == "passed" else _reason(report)
        day.append(PATH, kind="test", test=item.nodeid, part=PART, shard=SHARD, outcome=report.outcome,
                   seconds=round(call.duration, 3), why=why)  # fmt: skip
        if report.failed and STICKY.search(why):
            pytest.exit("the CUDA context is broken", returncode=BROKEN_CONTEXT)


def _reason(report) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr)[-2000:]
