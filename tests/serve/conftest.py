"""Chat servers in this process."""

from collections.abc import Callable, Iterator

import pytest

from kit.serving import Server
from kit.serving import model as model
from kit.serving import served as served
from kit.serving import start as start


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Iterator[Server]:
    with start() as running:
        yield running


@pytest.fixture
def slow(start: Callable[..., Server]) -> Iterator[Server]:
    """A server with one row, a queue of two, and 50 tokens/s."""
    with start(limits={"max_rows": 1, "max_queue": 2}, seconds=0.02) as running:
        yield running
