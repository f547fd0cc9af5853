"""What every test on a GPU runs under."""

import pytest

from dnl_kernels.testing.precision import float32_products


@pytest.fixture(autouse=True)
def float32_means_float32():
    with float32_products(tf32=False):
        yield
