"""How fast a model reads and writes on this machine, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlxchat.engine.kv_cache import KVCache
from mlxchat.model.gpt import GPT

_PROMPT_TOKENS = 512
_MOST_STEPS = 64


def measure_throughput(model: GPT, *, seconds: float = 0.5) -> dict[str, float]:
    """Return tokens per second of reading a prompt and of writing one answer, and the bytes MLX had at most.

    Args:
        model: to measure; nothing of it is changed.
        seconds: for each of the two.
    """
    mx.reset_peak_memory()  # of what this process did before
    tokens = min(_PROMPT_TOKENS, model.sizes.context_tokens)
    prompt = mx.arange(tokens)[None] % model.sizes.vocab_size

    def read() -> int:
        mx.eval(model.logits(model.hidden(prompt, KVCache(model.sizes, [tokens]))[:, -1]))
        return tokens

    reading = _rate(read, seconds)
    cache = KVCache(model.sizes, [tokens])
    mx.eval(model.hidden(prompt, cache))
    room = max(1, min(_MOST_STEPS, model.sizes.context_tokens))

    def write() -> int:
        mx.eval(model.logits(model.hidden(prompt[:, :1], cache)[:, -1]))
        return 1

    writing = _rate(write, seconds, most=room - 1)
    return {
        "prefill_tokens_per_second": reading,
        "decode_tokens_per_second": writing,
        "model_peak_memory_bytes": float(mx.get_peak_memory()),
    }


def _rate(work: Callable[[], int], seconds: float, most: int | None = None) -> float:
    """Return how much work is done per second, the first piece left out: it compiles."""
    work()
    began, done, pieces = time.perf_counter(), 0, 0
    while not pieces or (time.perf_counter() - began < seconds and (most is None or pieces < most)):
        done += work()
        pieces += 1
    return done / (time.perf_counter() - began)
