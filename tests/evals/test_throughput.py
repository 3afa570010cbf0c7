"""The speed that is reported is that of the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlxchat.engine.cache import Slots
from mlxchat.evals.throughput import measure_throughput
from mlxchat.model.gpt import GPT, flatten_parameters


def test_reading_and_writing_are_measured_in_tokens_per_second(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that needs 10 ms for every call reads its context of 64 tokens at 6,400 and writes at 100 a second."""
    for name in ("read", "step"):
        own = getattr(Slots, name)

        def slow(self: Slots, *given: Any, own: Callable[..., Any] = own) -> Any:
            time.sleep(0.01)
            return own(self, *given)

        monkeypatch.setattr(Slots, name, slow)
    found = measure_throughput(model, seconds=0.1)
    assert 640 < found["prefill_tokens_per_second"] < 6400
    assert 10 < found["decode_tokens_per_second"] < 100


def test_it_takes_about_the_time_that_it_may(model: GPT) -> None:
    began = time.monotonic()
    measure_throughput(model, seconds=0.1)
    assert time.monotonic() - began < 3


def test_the_memory_is_at_least_that_of_the_weights(model: GPT) -> None:
    weights = sum(value.nbytes for value in flatten_parameters(model).values())
    assert measure_throughput(model, seconds=0.01)["model_peak_memory_bytes"] >= weights


def test_nothing_of_the_model_is_changed(model: GPT) -> None:
    before = {name: np.array(value) for name, value in flatten_parameters(model).items()}
    measure_throughput(model, seconds=0.01)
    after = flatten_parameters(model)
    assert all((np.array(after[name]) == value).all() for name, value in before.items())
