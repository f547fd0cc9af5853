"""The CUDA kernels under AddressSanitizer + UndefinedBehaviorSanitizer and under ThreadSanitizer: bounds and races."""

import pathlib
import subprocess
import sys

import pytest

from dnl_kernels.testing import cuda_emulator

# One half type of every case but the largest: barriers and addresses do not depend on which one it is. And tf32, and
# float32, whose products have code of their own, of a case of each kernel.
FLOAT32 = "float32 and (seven or growth-12 or tokens-channels or wide-images or equation-1 or softmax-tokens)"
SUBSET = f"test_against_float64 and (bfloat16 or test_tf32 or {FLOAT32}) and not bands and not images-share-a-tile"


@pytest.mark.sanitizers
@pytest.mark.skipif(cuda_emulator.absence() is not None, reason=str(cuda_emulator.absence()))
@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_kernels_under(flavour):
    cuda_emulator.build(flavour)
    run = subprocess.run(
        [*cuda_emulator.sanitizer_prefix(), sys.executable, "-m", "pytest", "-k", SUBSET, "--show-capture=all"]
        + [str(pathlib.Path(__file__).parent), "-p", "no:cacheprovider"],
        env=cuda_emulator.sanitizer_environment(flavour), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
