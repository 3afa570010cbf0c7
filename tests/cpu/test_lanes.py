"""Lanes: each row is dealt once, calls run on their streams, and BLAS threads are restored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxchat.cpu import runtime
from mlxchat.cpu.lanes import Lanes


def lanes_of(count: int) -> Lanes:
    """Return this number of lanes on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "blas_threads", lambda: count)
        return Lanes()


@given(st.integers(1, 16), st.integers(1, 200))
def test_rows_are_dealt_once_in_equal_parts(num_lanes, rows):
    parts = lanes_of(num_lanes).deal(rows)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == min(num_lanes, rows)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_products_have_one_thread_while_several_lanes_compute():
    before = runtime.blas_threads()
    if before is None:
        pytest.skip("no OpenBLAS here")
    with lanes_of(2).sharing(1):
        assert runtime.blas_threads() == before
    with lanes_of(2).sharing(2):
        assert runtime.blas_threads() == 1
    assert runtime.blas_threads() == before
