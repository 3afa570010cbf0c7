"""Lanes share BLAS threads, which are restored."""

import pytest

from mlxchat.cpu import runtime
from mlxchat.cpu.lanes import Lanes


def lanes_of(count: int) -> Lanes:
    """Return this number of lanes on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "blas_threads", lambda: count)
        return Lanes()


def test_products_have_one_thread_while_several_lanes_compute():
    before = runtime.blas_threads()
    if before is None:
        pytest.skip("no OpenBLAS here")
    with lanes_of(2).sharing(1):
        assert runtime.blas_threads() == before
    with lanes_of(2).sharing(2):
        assert runtime.blas_threads() == 1
    assert runtime.blas_threads() == before
