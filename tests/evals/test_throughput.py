"""The speed that is reported is that of the model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxchat.engine.cache import Slots
from mlxchat.evals import throughput
from mlxchat.evals.throughput import measure_throughput
from mlxchat.model.gpt import flatten_parameters


def test_prefill_and_decoding_speed(model, monkeypatch):
    """With 10 ms per call: prefill of 64 tokens at 6,400 tokens/s, decoding at 100 tokens/s."""
    clock = [0.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for name in ("read", "step"):
        own = getattr(Slots, name)

        def slow(self: Slots, *given: Any, own: Callable[..., Any] = own) -> Any:
            clock[0] += 0.01
            return own(self, *given)

        monkeypatch.setattr(Slots, name, slow)
    found = measure_throughput(model, seconds=0.05)
    assert found["prefill_tokens_per_second"] == pytest.approx(6400)
    assert found["decode_tokens_per_second"] == pytest.approx(100)


def test_measuring_keeps_the_model_and_counts_its_memory(model):
    before = {name: np.array(value) for name, value in flatten_parameters(model).items()}
    found = measure_throughput(model, seconds=0.01)
    after = flatten_parameters(model)
    assert all((np.array(after[name]) == value).all() for name, value in before.items())
    assert found["model_peak_memory_bytes"] >= sum(value.nbytes for value in before.values())
