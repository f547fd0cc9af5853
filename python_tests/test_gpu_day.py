"""The driver of `make gpu-day`, without a GPU: its clock and limits, restarts behind a culprit, and the page."""

import json
import subprocess
import sys
import time

import pytest

from bench.gpu_day import summary
from bench.gpu_day.__main__ import STAGES, Plan, chosen, main
from bench.gpu_day.day import Day, append, rows
from bench.gpu_day.facts import runs_on
from dnl_kernels import _builder


def kinds(day, kind):
    return [row for row in rows(day.results) if row["kind"] == kind]


def test_a_step_ends_at_its_limit_with_all_that_it_started(tmp_path):
    """The day's clock runs ten times as fast: its 30 seconds are 3 of the wall's."""
    day = Day(tmp_path, 1000, speed=10)
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(marker)!r}).touch()"
    code = (
        f"import subprocess, sys, time; print('began', flush=True); subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    ended = day.step("sleeps", [sys.executable, "-c", code + "; time.sleep(60)"], limit=30)
    assert ended.code == 124 and "began" in ended.text
    (row,) = kinds(day, "step")
    assert row["name"] == "sleeps" and 30 <= row["seconds"] < 120
    assert "began" in (tmp_path / "log.txt").read_text()
    time.sleep(4)
    assert not marker.exists()


def test_no_step_starts_without_time(tmp_path):
    times = iter([0.0] + [95.0] * 100)
    day = Day(tmp_path, 100, clock=lambda: next(times))
    command = [sys.executable, "-c", "print(1)"]
    assert day.step("reserved", command, limit=60, reserve=4.5).code is None
    assert kinds(day, "step")[0]["tail"] == "no time was left"
    assert day.step("last", command, limit=60).code == 0


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, kind="test", test="a")
    with open(path, "a") as file:
        file.write('{"kind": "test", "te')
    assert [row["test"] for row in rows(path)] == ["a"] and rows(tmp_path / "none") == []


CULPRITS = """
import os, time, pytest
LOG = {log!r}

@pytest.mark.parametrize("name", ["first", "breaks", "second", "crashes", "third", "fails", "skips", "last"])
def test_each(name):
    with open(LOG, "a") as file:
        file.write(name + " ")
    if name == "breaks":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if name == "crashes":
        os.abort()
    if name == "skips":
        pytest.skip("a reason")
    assert name != "fails"
"""


@pytest.fixture
def plan(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    plan = Plan(Day(tmp_path / "out", 300), [], rehearse=False, workers=2)
    plan.folder = str(folder)
    return plan


def test_a_new_process_goes_on_behind_the_culprit(plan, tmp_path):
    """Each test runs once: behind a broken context and behind a crash, whose test gets its outcome from the driver."""
    log = tmp_path / "ran"
    (tmp_path / "tests" / "test_culprits.py").write_text(CULPRITS.format(log=str(log)))
    plan.part("rest", "0/1", look=False, reserve=0)
    assert log.read_text().split() == ["first", "breaks", "second", "crashes", "third", "fails", "skips", "last"]
    outcomes = {
        test.partition("[")[2].rstrip("]"): row["outcome"]
        for test, row in summary.tests(rows(plan.day.results)).items()
    }
    assert outcomes == {
        "first": "passed", "breaks": "failed", "second": "passed", "crashes": "crashed", "third": "passed",
        "fails": "failed", "skips": "skipped", "last": "passed",
    }  # fmt: skip
    assert [row["name"] for row in kinds(plan.day, "step")] == [
        "tests rest 0/1",
        "tests rest 0/1 #2",
        "tests rest 0/1 #3",
    ]
    page = summary.render(rows(plan.day.results))
    assert "| rest | 4 | 2 | 1 | 0 | 1 |" in page and "illegal memory access" in page and "- 1: a reason" in page
    assert "**Cut off**" in page and summary.verdict(rows(plan.day.results)) == 1


def test_a_part_that_is_ended_at_its_limit_blames_nobody(plan, tmp_path):
    (tmp_path / "tests" / "test_hangs.py").write_text("import time\ndef test_hangs():\n    time.sleep(600)\n")
    plan.facts = {}
    plan.part("rest", "0/1", look=False, reserve=0, limit=25)
    (row,) = kinds(plan.day, "test")
    assert row["outcome"] == "unfinished" and len(kinds(plan.day, "step")) == 1


SLOW = """
import time, pytest

@pytest.mark.parametrize("name", ["first", "killed", "later", "last"])
def test_each(name):
    with open({log!r}, "a") as file:
        file.write(name + " ")
    time.sleep(3 * (name == "killed"))
"""
DRIVER = """
import pathlib
from bench.gpu_day.__main__ import Plan
from bench.gpu_day.day import Day
plan = Plan(Day(pathlib.Path({out!r}), 300), [], rehearse=False, workers=1)
plan.folder = {folder!r}
plan.part("rest", "0/1", look=False, reserve=0)
"""


def test_a_day_that_is_killed_loses_nothing_and_is_continued(plan, tmp_path):
    """kill -9 of the driver in the middle of a test: the page is rendered from what is there, the orphaned process ends
    at its next test, and another day runs what has no outcome, and only that."""
    log = tmp_path / "ran"
    (tmp_path / "tests" / "test_slow.py").write_text(SLOW.format(log=str(log)))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(out=str(plan.day.out), folder=plan.folder)])
    until = time.monotonic() + 120
    while not (log.exists() and "killed" in log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    page = summary.render(rows(plan.day.results))
    assert "**Cut off**" in page and "| rest | 1 | 0 | 0 | 0 | 0 |" in page
    time.sleep(6)
    plan.part("rest", "0/1", look=False, reserve=0)
    assert log.read_text().split() == ["first", "killed", "later", "last"]
    assert {row["outcome"] for row in summary.tests(rows(plan.day.results)).values()} == {"passed"}


def test_parts_share_the_tests(plan, tmp_path):
    names = [*(f"dense_sum-cuda-{i}" for i in range(12)), "dense_sum-triton"]
    text = f"import pytest\n@pytest.mark.parametrize('name', {names})\ndef test_it(name):\n    pass\n"
    (tmp_path / "tests" / "test_parts.py").write_text(text)
    for shard in ("0/2", "1/2"):
        plan.part("dense_sum:cuda", shard, look=False, reserve=0)
    found = kinds(plan.day, "test")
    assert len({row["test"] for row in found}) == len(found) == 12 and {row["shard"] for row in found} == {"0/2", "1/2"}


def test_a_look_is_at_two_cases_that_the_backend_takes(plan, tmp_path):
    """Of each dtype; a refused case is none, an empty one shows nothing, and the others are left for the tests."""
    names = [f"dnl_layer-cuda-{case}-{dtype}" for dtype in ("float32", "half")
             for case in ("refused", "empty", "a", "refused-too", "b", "c")]  # fmt: skip
    text = (
        f"import pytest\n@pytest.mark.parametrize('name', {names})\ndef test_named_cases(name):\n"
        "    if 'refused' in name: pytest.skip('refused')\n    assert '-b-' not in name\n"
    )
    (tmp_path / "tests" / "test_looks.py").write_text(text)
    plan.part("dnl_layer:cuda", "0/1", look=True, reserve=0)
    outcomes = [row["outcome"] for row in kinds(plan.day, "test")]
    assert outcomes == ["skipped", "passed", "skipped", "failed"] * 2
    plan.part("dnl_layer:cuda", "0/1", look=False, reserve=0)
    assert len({row["test"] for row in kinds(plan.day, "test")}) == len(kinds(plan.day, "test")) == len(names)


def test_only():
    assert all(chosen([], stage) for stage in STAGES)
    only = ["tests:dense_sum", "bench"]
    assert chosen(only, "tests", "dense_sum:cuda") and not chosen(only, "tests", "dnl_layer:cuda")
    assert chosen(only, "bench", "attention") and not chosen(only, "look", "dense_sum:cuda")
    with pytest.raises(SystemExit):
        main(["--only", "tets"])


def test_the_page_of_a_whole_day(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, kind="facts", rehearsal=False, card="NVIDIA H100 80GB HBM3", missing={}, torch="2.11")
    for outcome, why in (("failed", "x\nwrong"), ("passed", "")):
        append(path, kind="test", test="t[a]", part="a:cuda", shard="0/1", outcome=outcome, seconds=1, why=why)
    append(path, kind="sanitizer", tool="memcheck", code=0, calls=7, failed=[], summary="0 errors")
    append(path, kind="bench", group="attention", case="ceilings", copy_gb_per_s=3000.0, bf16_tflops=700.0)
    times = {
        "device_us": 10.0,
        "p20_us": 9.0,
        "p80_us": 11.0,
        "rounds": 15,
        "stream_us": 12.0,
        "graph_us": "no capture",
    }
    times |= {"tflops": 70.0, "share_of_product": 0.1, "gb_per_s": 300.0, "share_of_copy": 0.1}
    append(path, kind="bench", group="attention", case="N4096", way="ours", tf32=True, train=False, dtype="float32",
           first_call_s=1.0, peak_bytes=2**20, error_output=1e-3, error_gradients=None, forward=times)  # fmt: skip
    append(path, kind="bench", group="attention", case="N4096", way="flex", error="no time was left")
    append(path, kind="end", complete=True)
    summary.write(path, tmp_path)
    page = (tmp_path / "nvidia-h100-80gb-hbm3.md").read_text()
    assert "| N4096 | ours | tf32 | forward | 10.0 | 9.0 to 11.0 | 12.0 | no capture | 10% | 10% | 1.0e-03 |  |" in page
    assert "- N4096, flex: no time was left" in page and "| a:cuda | 1 | 0 | 0 | 0 | 0 |" in page  # the last outcome
    assert "Cut off" not in page and "rehearsal" not in page and summary.verdict(rows(path)) == 0
    append(path, kind="sanitizer", tool="racecheck", code=86, calls=7, failed=[], summary="1 error")
    assert summary.verdict(rows(path)) == 1


@pytest.mark.parametrize(
    "architectures, capability, expected",
    [("8.0", "8.0", True), ("8.0", "8.6", True), ("8.6", "8.0", False), ("8.0", "9.0", False), ("9.0", "9.0", True)]
    + [("8.0;9.0+PTX", "10.0", True), ("8.0+PTX;8.6", "9.0", True), ("12.0+PTX", "9.0", False), ("", "9.0", False)],
)
def test_what_a_library_runs_on(architectures, capability, expected):
    assert runs_on(architectures, capability) == expected


@pytest.mark.parametrize(
    "cards, known, expected",
    [
        ("9.0\n9.0\n8.6\n", "compute_86 compute_90", "8.6;9.0"),
        ("10.0\n9.0\n", "compute_90 compute_100", "9.0;10.0"),
        ("9.0\n", "compute_80", _builder.WITHOUT_CARDS),  # newer than the compiler
        ("7.5\n9.0\n", "compute_75 compute_90", _builder.WITHOUT_CARDS),  # older than the kernels
        ("[N/A]\n", "compute_90", _builder.WITHOUT_CARDS),
        ("", "compute_90", _builder.WITHOUT_CARDS),
    ],
)
def test_what_is_compiled_for(cards, known, expected, tmp_path, monkeypatch):
    for name, text in (("nvidia-smi", cards), ("nvcc", known)):
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\nprint({text!r}, end='')\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DNL_CUDA_ARCH_LIST", raising=False)
    _builder.cards.cache_clear()
    try:
        assert _builder.architectures(str(tmp_path / "nvcc")) == expected
        monkeypatch.setenv("DNL_CUDA_ARCH_LIST", "8.9")
        assert _builder.architectures(str(tmp_path / "nvcc")) == "8.9"
    finally:
        _builder.cards.cache_clear()


def test_both_libraries_are_one_call_of_ninja_and_fail_apart(tmp_path, monkeypatch):
    """A fake ninja that knows which of the two does not compile."""
    log, fake = tmp_path / "calls", tmp_path / "ninja"
    fake.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "work, targets = sys.argv[2], sys.argv[5:]\n"
        "for t in targets: pathlib.Path(work, t).write_text('') if t != '_cuda.so' or not BROKEN else None\n"
        "print('x.cu(1): error: no'); sys.exit('_cuda.so' in targets and BROKEN)\n".replace("BROKEN", "__BROKEN__")
    )
    text = fake.read_text()
    monkeypatch.setattr(_builder, "_ninja", lambda: [str(fake)])
    monkeypatch.setattr(_builder, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(_builder, "_ninja_file", lambda *_: ("", ["_C.so", "_cuda.so"]))
    for broken, calls in ((False, [["_C.so", "_cuda.so"]]), (True, [["_C.so", "_cuda.so"], ["_C.so"], ["_cuda.so"]])):
        log.unlink(missing_ok=True)
        fake.write_text(text.replace("__BROKEN__", str(broken)))
        fake.chmod(0o755)
        outcome = _builder.build(tmp_path / "package", tmp_path / "work")
        assert outcome == {"_C.so": "built", "_cuda.so": "not built: x.cu(1): error: no" if broken else "built"}
        assert [json.loads(line)[4:] for line in log.read_text().splitlines()] == calls
