"""Lanes: each row is dealt once, calls run on their streams, and BLAS threads are restored."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxchat.cpu import runtime
from mlxchat.ops.device import Lanes, make_lanes


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = runtime.blas_threads()
    yield
    if before is not None:
        runtime.set_blas_threads(before)


def lanes_of(count: int) -> Lanes:
    """Return this number of lanes on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "blas_threads", lambda: count)
        return make_lanes()


class Dealer(Lanes):
    """Lanes without streams of their own."""

    def __init__(self, count: int) -> None:
        self.streams = [mx.default_stream(mx.cpu)] * count


@given(st.integers(1, 40), st.integers(1, 200))
def test_rows_are_dealt_once_in_equal_parts(num_lanes, rows):
    parts = Dealer(num_lanes).deal(rows)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == min(num_lanes, rows)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (3, 3), (64, 16)])
def test_one_lane_per_core_up_to_sixteen(cores, expected):
    assert len(lanes_of(cores)) == expected


def test_plain_path_has_one_lane(monkeypatch):
    monkeypatch.setattr(runtime, "blas_threads", lambda: None)
    assert len(make_lanes()) == 1
    monkeypatch.setattr(runtime, "blas_threads", lambda: 8)
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    assert len(make_lanes()) == 1


def test_calls_run_on_their_streams_in_order():
    three = lanes_of(3)
    seen = three.run([partial(lambda index: (index, mx.default_stream(mx.default_device())), i) for i in range(3)])
    assert seen == list(enumerate(three.streams))
    assert mx.default_stream(mx.default_device()) == three.streams[0]


needs_openblas = pytest.mark.skipif(runtime.blas_threads() is None, reason="no OpenBLAS here")


@needs_openblas
def test_products_have_one_thread_while_several_lanes_compute():
    def fail() -> None:
        assert runtime.blas_threads() == 1
        raise ZeroDivisionError

    runtime.set_blas_threads(2)
    with lanes_of(2).sharing(1):
        assert runtime.blas_threads() == 2
    with pytest.raises(ZeroDivisionError), lanes_of(2).sharing(2):
        fail()
    assert runtime.blas_threads() == 2


def test_lanes_reuse_their_streams():
    """Every evaluation, and every model that a server loads, creates lanes."""
    first = make_lanes()
    assert [make_lanes().streams for _ in range(3)] == [first.streams] * 3
