"""The emulated backend for the tests of the CUDA kernels."""

import pytest

from dnl_kernels.testing import cuda_emulator


@pytest.fixture(scope="session")
def emulated():
    """The emulator with every CUDA operator loaded; `backend="cuda_emulated"` works from then on."""
    if why := cuda_emulator.absence():
        pytest.skip(why)
    return cuda_emulator.install()


@pytest.fixture
def schedule(emulated, request):
    """The schedule of the parametrised test; back to the default one afterwards."""
    emulated.configure(request.param)
    yield request.param
    emulated.configure()
