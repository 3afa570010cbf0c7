"""Training in another process: nanochat's ranks, bounded, stopped at once, and gone when its parent is."""

from __future__ import annotations

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
    """Return the result of a training."""
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
    """Ranks that other tests keep for later ones are none of this file's processes."""
    KEPT.clear()
    KEPT.update(psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child not in KEPT]


@settings(max_examples=12)
@given(texts=st.lists(st.text() | st.sampled_from(TEXTS), max_size=30), merges=st.integers(0, 40))
def test_the_ranks_are_those_of_nanochats_call(texts: list[str], merges: int) -> None:
    assert train(texts, 256 + merges).ranks == nanochats_ranks(texts, 256 + merges)


def test_more_documents_than_are_counted_at_a_time_and_long_ones_give_the_same_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [*TEXTS * 3, "", "long " * 400_000, *TEXTS, "\x00", "é" * 1000]
    expected = nanochats_ranks(texts, 400)
    assert train(texts, 400).ranks == expected
    monkeypatch.setattr(bpe, "_BUFFER_DOCUMENTS", 7)
    assert train(iter(texts), 400).ranks == expected


def test_what_was_done_is_reported_and_counted() -> None:
    *seen, made = train_ranks(TEXTS, 300)
    assert made.chars == sum(map(len, TEXTS))
    assert made.pieces is not None
    assert made.pieces > 100
    assert made.merges == 44
    assert 1 << 20 < made.peak_bytes < 100 << 20  # its own, not what this process holds
    counted = [(now.chars, now.merges) for now in seen]
    assert counted == sorted(counted)


def test_documents_are_read_as_they_are_needed_and_never_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what was counted and what was asked for lie at most the two buffers, the pipe and a frame."""
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


def test_it_stops_while_it_counts_and_leaves_no_process() -> None:
    began = time.monotonic()
    with closing(train_ranks(endless(), 300)) as training:
        for _ in training:
            if time.monotonic() - began > 0.5:
                break
    assert time.monotonic() - began < 3
    assert children() == []


def test_it_stops_while_rustbpe_holds_the_interpreter_for_the_merges() -> None:
    """Minutes of merges of random words: the worker answers nobody, and ends all the same.

    Words of few patterns had no merges left after a hundredth of a second, and the training was over instead.
    """
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(150_000)]
    with closing(train_ranks(texts, 1_000_000)) as training:
        next(now for now in training if now.pieces)
        next(training)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 2
    assert children() == []


def test_a_document_that_cannot_be_read_ends_it_with_its_own_error() -> None:
    def broken() -> Iterator[str]:
        yield "one"
        raise DataError("shard 7 is damaged")

    with pytest.raises(DataError, match="shard 7 is damaged"):
        train(broken(), 300)
    with pytest.raises(DataError, match="a document is not valid Unicode"):
        train(["\ud800"], 300)
    assert children() == []


def test_more_memory_than_it_may_have_is_told_with_what_to_lower() -> None:
    with pytest.raises(DataError, match=r"more than the 1\.0 MB it may have.*Lower tokenizer\.max_chars"):
        list(train_ranks(endless(), 300, memory_limit_bytes=1_000_000))
    assert children() == []


def test_a_worker_that_is_killed_is_told() -> None:
    def kill_at_once() -> None:
        for _ in train_ranks(endless(), 300):
            for child in children():
                child.kill()

    with pytest.raises(StepFailed, match="ended by signal 9"):
        kill_at_once()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_to_the_worker_as_it_starts_ends_no_training(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Ctrl-C a run ended with "the process that trains the tokenizer ended by signal 2" if the worker was first."""

    class Signalled(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.send_signal(number)  # before Python runs in it

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    assert train(TEXTS, 300).ranks == nanochats_ranks(TEXTS, 300)


PARENT = """
    import itertools, psutil, signal, sys
    from mlxchat.data.bpe import train_ranks
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    training = train_ranks(itertools.cycle(["the weather " * 50]), 300)
    next(training)
    print(psutil.Process().children()[0].pid, flush=True)
    for _ in training:
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_worker_ends_with_its_parent(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", dedent(PARENT)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, number)
        parent.wait()
        _, alive = psutil.wait_procs([worker], timeout=5)
    assert alive == []


def test_the_terminals_interrupt_does_not_reach_the_worker_before_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", dedent(PARENT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stderr is not None
        parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGINT)
        text = parent.stderr.read()
    assert "KeyboardInterrupt" in text
    assert "ended by signal" not in text


@pytest.mark.parametrize("size", [0, 264])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"vocab_size is {size}, expected at least 265"):
        train_tokenizer(TEXTS, size)


def test_a_vocabulary_of_bytes_alone_needs_no_merges() -> None:
    assert train_tokenizer([], 265).ranks == {bytes([byte]): byte for byte in range(256)}
