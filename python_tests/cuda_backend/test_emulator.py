"""The emulator itself: it computes what CUDA means, under every schedule, and finds each planted bug."""

import array
import ctypes
import math
import random
import struct
import subprocess
import sys

import pytest

from dnl_kernels.testing import cuda_emulator
from dnl_kernels.testing.cuda_emulator import SCHEDULES, Emulator, Traffic

from . import self_test
from .self_test import coarse, half, pointer

pytestmark = pytest.mark.skipif(cuda_emulator.absence() is not None, reason=str(cuda_emulator.absence()))


@pytest.fixture(scope="module")
def emulator():
    library = cuda_emulator.build("plain", [self_test.SOURCE])
    return Emulator(self_test.load(library))


@pytest.fixture(scope="module")
def banks():
    return Emulator(self_test.load(cuda_emulator.build("banks", [self_test.SOURCE])))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s)))
def test_every_schedule_gives_the_result(emulator, schedule):
    emulator.configure(schedule)
    assert self_test.row_sum(emulator.library) is None
    for bfloat16 in (True, False):
        assert self_test.matmul(emulator.library, bfloat16=bfloat16) is None


def test_counts_and_traffic_of_a_known_kernel(emulator):
    x, out = array.array("f", [1.0] * 3000), array.array("f", [0.0] * 3)
    total = array.array("f", [0.0])
    emulator.counts()
    with emulator.tracing():
        assert emulator.library.run_row_sum(pointer(x), pointer(out), pointer(total), 3, 1000, 0) is None
    counts = emulator.counts()
    assert (counts["launches"], counts["blocks"], counts["threads"], counts["barriers"]) == (1, 3, 3 * 128, 3)
    assert counts["collectives"] == 3 * (4 + 1) * 5  # a warp sum is five shuffles
    loads, stores = emulator.traffic_of(x.buffer_info()[0], 12000)
    assert loads.requested == 12000 and stores == Traffic(0, 0, 0)
    first, last = x.buffer_info()[0] // 32, (x.buffer_info()[0] + 11999) // 32
    assert loads.distinct == 32 * (last - first + 1) <= loads.by_blocks <= loads.distinct + 2 * 32
    assert emulator.traffic_of(out.buffer_info()[0], 12)[1].requested == 12


@pytest.mark.parametrize("allowed, most", [(False, 48), (True, 227)])
def test_static_and_dynamic_shared_memory_have_one_limit(emulator, allowed, most):
    """16 KiB are the kernel's own; the rest may be dynamic, and not a byte more."""
    out = array.array("f", [0.0] * 32)
    largest = (most - 16) << 10
    assert emulator.library.run_static_and_dynamic(pointer(out), largest, allowed) is None
    assert out.tolist() == [2.0] * 32
    said = emulator.library.run_static_and_dynamic(pointer(out), largest + 16, allowed).decode()
    assert f"16384 bytes of static and {largest + 16} of dynamic shared memory" in said
    assert f"may have {most << 10}" in said and ("unless its kernel" in said) == (not allowed)
    assert emulator.library.run_static_and_dynamic(pointer(out), (most + 1) << 10, allowed) is not None


def test_bank_conflicts_of_ldmatrix_are_counted(emulator):
    emulator.counts()
    assert self_test.matmul(emulator.library) is None
    counts = emulator.counts()
    assert counts["ldmatrix"] > 0 and counts["ldmatrix_conflicts"] == 0  # its tiles are padded
    for stride, conflicts in ((8, 0), (16, 1), (32, 3), (64, 7), (72, 0)):  # elements between the rows of a matrix
        fragments(emulator, stride=stride)
        assert emulator.counts()["ldmatrix_conflicts"] == 8 * conflicts


@pytest.mark.parametrize(
    ("size", "stride", "conflicts"),
    [(4, 0, 0), (4, 4, 0), (4, 8, 1), (4, 12, 0), (4, 128, 31), (4, 132, 0), (8, 8, 0), (8, 16, 1), (8, 128, 15)]
    + [(16, 16, 0), (16, 32, 1), (16, 48, 0), (16, 128, 7), (16, 144, 0)],
)
def test_bank_conflicts_of_ordinary_accesses_are_counted(banks, size, stride, conflicts):
    """A write and a read by 32 lanes: of 4 bytes in one go, of 8 in two, of 16 in four, without conflicts."""
    banks.counts()
    out = array.array("f", [0.0] * 132)
    aligned = ctypes.c_void_p((out.buffer_info()[0] + 15) // 16 * 16)
    assert banks.library.run_strided(aligned, size, stride) is None
    counts = banks.counts()
    goes = 2 * size // 4
    assert (counts["shared"], counts["shared_conflicts"]) == (goes, goes * conflicts)


def fragments(emulator, matrices=None, stride=8):
    matrices = array.array("H", matrices or range(256))
    plain, transposed, lanes = (array.array("I", [0] * n) for n in (128, 128, 160))
    said = emulator.library.run_fragments(*map(pointer, (matrices, plain, transposed, lanes)), stride)
    assert said is None, said
    return plain, transposed, [lanes[32 * i : 32 * i + 32].tolist() for i in range(5)]


def test_ldmatrix_fragments_follow_the_ptx_manual(emulator):
    """PTX ISA, ldmatrix: lane l holds row l / 4, columns 2 (l % 4) and + 1 of a matrix (.trans: of its transpose)."""
    values = random.Random(2).sample(range(1 << 16), 256)
    plain, transposed, _ = fragments(emulator, values)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        for i in range(4):
            element = lambda r, c: values[64 * i + 8 * r + c]  # noqa: B023, E731
            assert plain[4 * lane + i] == element(row, column) | element(row, column + 1) << 16
            assert transposed[4 * lane + i] == element(column, row) | element(column + 1, row) << 16


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda s: s.async_copy)
def test_cp_async_and_the_smaller_ldmatrix_follow_the_ptx_manual(emulator, schedule):
    """cp.async: the calling thread's 16 bytes, zeros beyond src-size; ldmatrix .x1 takes the addresses of lanes 0 to 7,
    .x2 of lanes 0 to 15."""
    emulator.configure(schedule)
    values = random.Random(4).sample(range(1 << 16), 256)
    to, one, two = array.array("H", [1] * 256), array.array("I", [0] * 32), array.array("I", [0] * 64)
    assert emulator.library.run_copies(*map(pointer, (array.array("H", values), to, one, two))) is None
    rows = [[0] * 8 if row % 3 == 0 else values[8 * (31 - row) : 8 * (31 - row) + 8] for row in range(32)]
    assert to.tolist() == [value for row in rows for value in row]
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        assert one[lane] == rows[row][column] | rows[row][column + 1] << 16
        for i in range(2):
            assert two[2 * lane + i] == rows[8 * i + column][row] | rows[8 * i + column + 1][row] << 16


def test_votes_and_shuffles(emulator):
    _, _, (vote, up, down, index, count) = fragments(emulator)
    assert vote == [sum(1 << i for i in range(0, 32, 3))] * 32
    assert up == [i - 1 if i % 8 else i for i in range(32)]
    assert down == [i + 2 if i % 16 < 14 else i for i in range(32)]
    assert index == [i // 8 * 8 + 5 for i in range(32)]
    assert count == [7] * 32


@pytest.mark.parametrize("bfloat16", [False, True])
def test_mma_fragments_follow_the_ptx_manual(emulator, bfloat16):
    """PTX ISA, mma.m16n8k16: with g = lane >> 2 and t = lane % 4, element a_i is at row g for i in {0, 1, 4, 5}, else
    g + 8, and column 2 t + (i & 1), + 8 if i >= 4; b_i at row 2 t + (i & 1), + 8 if i >= 2, and column g; c_i at row g,
    + 8 if i >= 2, and column 2 t + (i & 1)."""
    generator = random.Random(3)
    a, b, c = ([[coarse(generator) for _ in range(n)] for _ in range(m)] for m, n in ((16, 16), (16, 8), (16, 8)))
    fa, fb, fc, expected = array.array("H"), array.array("H"), array.array("f"), []
    for lane in range(32):
        g, t = lane >> 2, lane % 4
        for i in range(8):
            fa.append(half(a[g if i in (0, 1, 4, 5) else g + 8][2 * t + (i & 1) + (8 if i >= 4 else 0)], bfloat16))
        for i in range(4):
            fb.append(half(b[2 * t + (i & 1) + (8 if i >= 2 else 0)][g], bfloat16))
            row, column = g + (8 if i >= 2 else 0), 2 * t + (i & 1)
            fc.append(c[row][column])
            expected.append(c[row][column] + sum(a[row][k] * b[k][column] for k in range(16)))
    assert emulator.library.run_mma(pointer(fa), pointer(fb), pointer(fc), int(bfloat16)) is None
    assert fc.tolist() == expected


def test_tf32_fragments_follow_the_ptx_manual(emulator):
    """PTX ISA, mma.m16n8k8 with .tf32: with g = lane >> 2 and t = lane % 4, a_i is at row g for i in {0, 2}, else at
    g + 8, and column t for i in {0, 1}, else t + 4; b_i at row t + 4 i and column g; c_i at row g, + 8 if i >= 2, and
    column 2 t + (i & 1)."""
    generator = random.Random(5)
    a, b, c = ([[coarse(generator) for _ in range(n)] for _ in range(m)] for m, n in ((16, 8), (8, 8), (16, 8)))
    fa, fb, fc, expected = array.array("f"), array.array("f"), array.array("f"), []
    for lane in range(32):
        g, t = lane >> 2, lane % 4
        fa.extend(a[g if i in (0, 2) else g + 8][t if i in (0, 1) else t + 4] for i in range(4))
        fb.extend(b[t + 4 * i][g] for i in range(2))
        for i in range(4):
            row, column = g + (8 if i >= 2 else 0), 2 * t + (i & 1)
            fc.append(c[row][column])
            expected.append(c[row][column] + sum(a[row][k] * b[k][column] for k in range(8)))
    assert emulator.library.run_mma_tf32(pointer(fa), pointer(fb), pointer(fc), 0) is None
    assert fc.tolist() == expected


def test_tf32_has_ten_bits_rounded_to_nearest_ties_away_from_zero(emulator):
    """PTX ISA, cvt.rna.tf32.f32, here by exact arithmetic of the significand."""
    generator = random.Random(6)
    given = [struct.unpack("<f", struct.pack("<I", generator.getrandbits(32)))[0] for _ in range(2000)]
    given += [0.0, -0.0, 1.0, 1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23, 1 + 3 * 2.0**-11, 2 - 2.0**-23]
    given = [value for value in given if math.isfinite(value) and (value == 0 or abs(value) >= 2.0**-126)]
    values = array.array("f", [*given, math.inf, -math.inf, math.nan, 3.4028235e38])
    emulator.library.run_to_tf32(pointer(values), len(values))
    for value, rounded in zip(given, values, strict=False):
        significand, exponent = math.frexp(value)  # in [1/2, 1): 11 bits are the leading one and ten
        digits = math.floor(abs(significand) * 2**11 + 0.5)
        expected = math.inf if digits * 2.0 ** (exponent - 11) >= 2.0**128 else digits * 2.0 ** (exponent - 11)
        assert rounded == math.copysign(expected, value)
    assert values[-4:-2].tolist() == [math.inf, -math.inf] and math.isnan(values[-2]) and values[-1] == math.inf


def test_an_operand_that_was_not_converted_to_tf32_is_an_error(emulator):
    """Hardware would cut it off without a word."""
    a, b, c = (array.array("f", [1 + 2.0**-11] * 128), array.array("f", [1.0] * 64), array.array("f", [0.0] * 128))
    said = emulator.library.run_mma_tf32(pointer(a), pointer(b), pointer(c), 0)
    assert said and b"is no tf32 number" in said
    assert emulator.library.run_mma_tf32(pointer(a), pointer(b), pointer(c), 1) is None
    assert c.tolist() == [8 * (1 + 2.0**-10)] * 128


FOUND_AT_ONCE = {
    ("row_sum", "divergent_shuffle"): "the warp diverged",
    ("row_sum", "unwritten_output"): "wrong result",
    ("row_sum", "unreached_barrier"): "has left the kernel",
    ("row_sum", "unwritten_shared"): "wrong result",
    ("row_sum", "misaligned_vector"): "global load of 16 bytes at misaligned",
    ("matmul", "wrong_wait"): "wrong result",
    ("matmul", "misaligned_row"): "ldmatrix: row of 16 bytes at misaligned",
}
FOUND_BY_A_SANITIZER = {
    ("row_sum", "out_of_bounds", "address"): "AddressSanitizer: use-after-poison",
    ("matmul", "small_shared", "address"): "ERROR: AddressSanitizer",
    ("row_sum", "missing_barrier", "thread"): "ThreadSanitizer: data race",
    ("matmul", "missing_loop_barrier", "thread"): "ThreadSanitizer: data race",
}


@pytest.mark.parametrize(("kernel", "bug"), FOUND_AT_ONCE)
def test_a_planted_bug_that_the_plain_build_finds(emulator, kernel, bug):
    """Under some schedule the emulator says so, or the result is visibly wrong: NaN."""
    reports = set()
    for schedule in SCHEDULES:
        emulator.configure(schedule)
        reports.add(self_test.run(emulator.library, kernel, bug) or "nothing")
    assert any(FOUND_AT_ONCE[kernel, bug] in report for report in reports), reports


@pytest.mark.parametrize(("kernel", "bug", "flavour"), FOUND_BY_A_SANITIZER)
def test_a_planted_bug_that_a_sanitizer_finds(kernel, bug, flavour):
    """The sanitizer ends the process and names it; without the bug the same build passes."""
    library = cuda_emulator.build(flavour, [self_test.SOURCE])
    for planted, expected in ((bug, FOUND_BY_A_SANITIZER[kernel, bug, flavour]), ("none", "clean")):
        run = subprocess.run(
            [*cuda_emulator.sanitizer_prefix(), sys.executable, self_test.__file__, str(library), kernel, planted],
            env=cuda_emulator.sanitizer_environment(flavour), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert expected in run.stdout + run.stderr, run.stdout + run.stderr[-2000:]
        assert (run.returncode == 0) == (planted == "none")


def test_bad_launches_are_errors(emulator):
    x = pointer(array.array("f", [0.0]))
    assert b"a grid of 0 x 1 x 1 blocks" in emulator.library.run_row_sum(x, x, x, 0, 1, 0)
