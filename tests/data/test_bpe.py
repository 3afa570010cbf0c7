"""The tokenizer's worker process: nanochat's ranks, bounded memory, and its end."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from textwrap import dedent
from typing import Any

import psutil
import pytest
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxchat.data import bpe
from mlxchat.data.bpe import Trained, train_ranks, train_tokenizer
from mlxchat.data.vocabulary import SPLIT_PATTERN
from mlxchat.errors import DataError, StepFailed
from mlxchat.runner.process import SIGNALS

TEXTS = [
    f"the weather of day {number}, and another: don't gather under thunder {number * 7}!\n" for number in range(300)
]


def train(texts: Iterable[str], num_tokens: int) -> Trained:
    *_, trained = train_ranks(texts, num_tokens)
    return trained


def nanochats_ranks(texts: list[str], num_tokens: int) -> dict[bytes, int]:
    """Return what nanochat's RustBPETokenizer.train_from_iterator gets."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), num_tokens, pattern=SPLIT_PATTERN)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


KEPT: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def others_children() -> None:
    """Ignore processes that other tests keep running."""
    KEPT.clear()
    KEPT.update(psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child not in KEPT]


@settings(max_examples=12)
@given(texts=st.lists(st.text() | st.sampled_from(TEXTS), max_size=30), merges=st.integers(0, 40))
def test_ranks_are_nanochats(texts, merges):
    assert train(texts, 256 + merges).ranks == nanochats_ranks(texts, 256 + merges)


def test_ranks_do_not_depend_on_the_buffer(monkeypatch):
    texts = [*TEXTS * 3, "", "long " * 400_000, *TEXTS, "\x00", "é" * 1000]
    expected = nanochats_ranks(texts, 400)
    assert train(texts, 400).ranks == expected
    monkeypatch.setattr(bpe, "_BUFFER_DOCUMENTS", 7)
    assert train(iter(texts), 400).ranks == expected


def test_documents_are_read_on_demand(monkeypatch):
    """At most the two buffers, the pipe and a part are read ahead of the counting."""
    monkeypatch.setattr(bpe, "_BUFFER_DOCUMENTS", 8)
    asked, ahead = 0, []

    def documents() -> Iterator[str]:
        nonlocal asked
        for number in range(3000):
            asked += 1
            yield f"{number} " + "word " * 2000

    counted = 0
    for now in train_ranks(documents(), 270):
        if now.chars > counted and asked < 3000:  # a new report
            counted = now.chars
            ahead.append(asked - counted / 10_005)
    assert max(ahead, default=0) < 8 * 4 + (bpe._PART_CHARS * 3 + (1 << 16)) / 10_000


def endless() -> Iterator[str]:
    return itertools.cycle(TEXTS)


def test_merging_stops_at_once():
    """Merging random words takes minutes; words of few patterns would have no merges left at once."""
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(50_000)]
    with closing(train_ranks(texts, 1_000_000)) as training:
        next(now for now in training if now.pieces)
        next(training)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 2
    assert children() == []


def test_unreadable_document_raises_its_error():
    def broken() -> Iterator[str]:
        yield "one"
        raise DataError("shard 7 is damaged")

    with pytest.raises(DataError, match="shard 7 is damaged"):
        train(broken(), 300)
    with pytest.raises(DataError, match="a document is not valid Unicode"):
        train(["\ud800"], 300)
    assert children() == []


def test_memory_limit_is_enforced():
    with pytest.raises(DataError, match=r"more than its limit of 1\.0 MB.*Lower tokenizer\.max_chars"):
        list(train_ranks(endless(), 300, memory_limit_bytes=1_000_000))
    assert children() == []


def test_killed_worker_is_reported():
    def kill_at_once() -> None:
        for _ in train_ranks(endless(), 300):
            for child in children():
                child.kill()

    with pytest.raises(StepFailed, match="ended by signal 9"):
        kill_at_once()


@pytest.mark.parametrize("number", SIGNALS)
def test_worker_ignores_stop_signals_at_its_start(number, monkeypatch):
    """At Ctrl-C a run ended with "training process ended by signal 2" if the worker got the signal first."""

    class Signalled(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.send_signal(number)  # before Python runs in it

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    assert train(TEXTS, 300).ranks == nanochats_ranks(TEXTS, 300)


PARENT = """
    import itertools, psutil, signal, sys
    from mlxchat.data.bpe import train_ranks
    signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored by pytest's parent
    training = train_ranks(itertools.cycle(["the weather " * 50]), 300)
    next(training)
    print(psutil.Process().children()[0].pid, flush=True)
    for _ in training:
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_worker_ends_with_its_parent(number):
    with subprocess.Popen([sys.executable, "-c", dedent(PARENT)], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, number)
        parent.wait()
        _, alive = psutil.wait_procs([worker], timeout=5)
    assert alive == []


def test_ctrl_c_reaches_only_the_parent():
    with subprocess.Popen(
        [sys.executable, "-c", dedent(PARENT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as parent:  # fmt: skip
        parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGINT)
        text = parent.stderr.read()
    assert "KeyboardInterrupt" in text
    assert "ended by signal" not in text


def test_vocabulary_has_265_tokens_at_least():
    with pytest.raises(DataError, match="vocab_size is 264, expected at least 265"):
        train_tokenizer(TEXTS, 264)
    assert train_tokenizer([], 265).ranks == {bytes([byte]): byte for byte in range(256)}
