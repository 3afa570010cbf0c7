"""Small GPTs none of whose weights is zero, their tokenizer of 280 ids, and a model whose answers are given."""

import mlxchat  # isort: split

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.decode import Decoder, LastEmbedding, Past, tokens_of
from mlxchat.interop.names import architecture_values
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

VOCABULARY = 280
features_of = cache(architecture_values)


@contextmanager
def computing_on_cpu() -> Iterator[None]:
    """Compute on the CPU, then on what was chosen before."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@cache
def composed(*overrides: str) -> Config:
    """Return a composed configuration, which the caller must not change."""
    return compose_config(list(overrides)).config


@cache
def make_tokenizer() -> Tokenizer:
    """Return the tokenizer of VOCABULARY ids."""
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log " * 5], VOCABULARY)


def make_model(
    architecture: str = "oct2025", *, seed: int = 7, scale: float = 0.2, head_scale: float | None = None, **sizes: Any
) -> GPT:
    """Return a model with grouped heads, the same each time; no weight starts at zero as nanochat's projections do.

    Weights have the deviation `scale`, embeddings 1, the head `head_scale` if given; `sizes` are fields of GPTSizes.
    """
    small = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 32,
             "context_tokens": 64}  # fmt: skip
    model = GPT(GPTSizes(**{**small, **features_of(architecture), **sizes}))
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> mx.array:
        deviation = 1.0 if "wte" in name else head_scale if head_scale and "lm_head" in name else scale
        return mx.array((rng.normal(scale=deviation, size=shape) + (name == "resid_lambdas")).astype(np.float32))

    set_parameters(model, {name: drawn(name, value.shape) for name, value in flatten_parameters(model).items()})
    return model


def arrays_of(model: GPT) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(value) for name, value in flatten_parameters(model).items()}


class ScriptedDecoder(Decoder):
    """Its most likely token after t tokens of an answer is scripts[p][t]; the last one repeats.

    p is the number of the prompt's tokens before its last one, less `shortest`, at most that of the last script. A step
    takes `seconds`.
    """

    def __init__(
        self, scripts: Sequence[Sequence[int]], vocab_size: int, seconds: float = 0.0, shortest: int = 0
    ) -> None:
        self.scripts, self.vocab_size, self.seconds, self.shortest = scripts, vocab_size, seconds, shortest
        self.model: Any = SimpleNamespace(sizes=None)
        self.given: list[list[int]] = []
        self.lengths = np.zeros(0, dtype=np.int64)
        self.starts = np.zeros(0, dtype=np.int64)
        self.room, self.last = 1 << 20, LastEmbedding([None])

    def __call__(self, model: Any) -> "ScriptedDecoder":
        """Begin again; an engine creates a decoder of its model."""
        self.resize([], 0, 1)
        return self

    def read(self, prompts: Sequence[Sequence[int]], past: Past | None = None, last: int | None = None) -> list[Past]:
        return [past_of_zeros(tokens_of(past) + len(prompt)) for prompt in prompts]

    def resize(self, kept: Sequence[int], rows: int, tokens: int) -> None:
        for name in ("lengths", "starts"):
            before, after = getattr(self, name), np.zeros(rows, dtype=np.int64)
            after[: len(kept)] = before[list(kept)]
            setattr(self, name, after)

    def fill(self, first: int, pasts: Sequence[Past | None], last: Sequence[int]) -> None:
        rows = slice(first, first + len(pasts))
        self.lengths[rows] = self.starts[rows] = [tokens_of(past) for past in pasts]

    def past_of(self, row: int, tokens: int) -> Past:
        return past_of_zeros(tokens)

    def step(self, tokens: mx.array, advances: Sequence[bool]) -> mx.array:
        time.sleep(self.seconds)
        self.given.append(np.asarray(tokens).tolist())
        logits = np.zeros((len(advances), self.vocab_size), dtype=np.float32)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            script = self.scripts[min(max(start - self.shortest, 0), len(self.scripts) - 1)]
            logits[row, script[min(length - start, len(script) - 1)]] = 1000.0
        self.lengths = self.lengths + np.array(advances)
        return mx.array(logits)


def past_of_zeros(tokens: int) -> Past:
    return [(mx.zeros((1, 1, tokens, 1)),) * 2]
