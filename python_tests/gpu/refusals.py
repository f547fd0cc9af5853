"""Calls that a backend asked for by name cannot run."""

import contextlib

import pytest


def refused(call):
    """Why a backend that is asked for by name cannot run the call, or None."""
    try:
        call()
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        return str(error)
    return None


@contextlib.contextmanager
def skipped_where_refused():
    """The test is skipped with the backend's reason."""
    try:
        yield
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))
