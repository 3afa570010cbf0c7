"""Speed of prefill and decoding on this machine, measured in about a second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import mlx.core as mx

from mlxchat.engine.cache import Slots
from mlxchat.engine.decode import make_decoder
from mlxchat.model.gpt import GPT

_PROMPT_TOKENS = 512
_MOST_STEPS = 64


def measure_throughput(model: GPT, *, seconds: float = 0.5) -> dict[str, float]:
    """Return tokens per second of prefill and of decoding one answer, and MLX's peak memory in bytes.

    Args:
        model: to measure; it is not changed.
        seconds: per measurement.
    """
    mx.reset_peak_memory()  # forget earlier peaks of this process
    tokens = min(_PROMPT_TOKENS, model.sizes.context_tokens)
    prompt = [place % model.sizes.vocab_size for place in range(tokens)]
    slots = Slots(make_decoder(model))

    def read() -> int:
        slots.read(prompt, None, None)
        return tokens

    reading = _rate(read, seconds)
    slots.reserve(1, tokens + _MOST_STEPS)
    slots.fill(0, slots.read(prompt, None, None))
    position = itertools.count(tokens)

    def write() -> int:
        slots.step(prompt[:1], prompt[-1:], [next(position)])
        return 1

    writing = _rate(write, seconds, most=_MOST_STEPS - 1)
    return {
        "prefill_tokens_per_second": reading,
        "decode_tokens_per_second": writing,
        "model_peak_memory_bytes": float(mx.get_peak_memory()),
    }


def _rate(work: Callable[[], int], seconds: float, most: int | None = None) -> float:
    """Return the work done per second without the first call, which compiles."""
    work()
    began, done, pieces = time.perf_counter(), 0, 0
    while not pieces or (time.perf_counter() - began < seconds and (most is None or pieces < most)):
        done += work()
        pieces += 1
    return done / (time.perf_counter() - began)
