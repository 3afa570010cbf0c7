"""Sampling of the next token, on the device.

In this order: logit bias and penalties, temperature, top-k, top-p, min-p. A row's draws are numbers in [0, 1) that
depend on its seed alone, so a seed repeats its tokens on every backend up to rounding. Nothing waits for the device,
except in rows with a grammar, a bias or penalties, whose next distribution depends on the latest token.

Shapes: B rows, V vocabulary, N candidates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from mlxchat.engine.third_party import AnyTokenizer

# Smaller divisors of logits overflow float32, and are greedy in any case.
_LEAST_TEMPERATURE = 1e-15
MOST_DRAW = 1 - 1e-6
# Spaces as in json.dumps. With free white space a small model may fill its answer with line breaks.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; None is off."""

    temperature: float = 0.0  # 0 takes the most likely token; above 0 logits are divided by it
    top_k: int | None = None  # draw among the k most likely
    top_p: float | None = None  # draw among the fewest likeliest tokens that, after top_k, add up to this
    min_p: float | None = None  # draw among tokens with at least this fraction of the highest probability
    repetition_penalty: float | None = None  # divides positive logits of prompt and answer, multiplies negative ones
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each occurrence in the answer
    presence_penalty: float = 0.0  # subtracted once from the logit of each token in the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, number added to its logit)
    seed: int = 0  # seed of the row's draws

    @property
    def adjusts(self) -> bool:
        """Whether logits change by the tokens so far, or by a bias."""
        repeated = self.repetition_penalty not in (None, 1)
        return bool(repeated or self.frequency_penalty or self.presence_penalty or self.logit_bias)


class Sampler:
    """Draws a token for each row of a batch by the row's settings."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        """Prepare the rows' settings as arrays (B, 1)."""

        def column(values: list[Any], off: float) -> mx.array:
            return mx.array([[off if value is None else value] for value in values], dtype=mx.float32)

        drawn = [row for row in rows if row.temperature > 0]
        self.is_greedy = not drawn
        self._temperature = column([max(row.temperature, _LEAST_TEMPERATURE) for row in rows], 1.0)
        self._is_drawn = mx.array([row.temperature > 0 for row in rows])
        self._top_k = column([row.top_k for row in rows], float("inf"))
        self._top_p = column([row.top_p for row in rows], 2.0)
        self._min_p = column([row.min_p for row in rows], 0.0)
        self._has_min_p = any(row.min_p is not None for row in drawn)
        ranked = any(row.top_k is not None or row.top_p is not None for row in drawn)
        self._most: float | None = max(row.top_k or float("inf") for row in drawn) if ranked else None
        """Candidates to sort, at most; None: nothing depends on an order."""

    def __call__(self, logits: mx.array, draws: Sequence[float]) -> mx.array:
        """Return tokens (B,) drawn by logits (B, V) in float32 with one number in [0, 1) for each row."""
        best = most_likely(logits)
        if self.is_greedy:
            return best
        ids, probabilities = self.distribution(logits)
        place = draw_places(probabilities, draws)
        drawn = place if ids is None else mx.take_along_axis(ids, place, axis=-1)
        return mx.where(self._is_drawn, drawn[:, 0].astype(best.dtype), best)

    def distribution(self, logits: mx.array) -> tuple[mx.array | None, mx.array]:
        """Return the candidates (B, N), None for all in order, and their probabilities (B, N), not normalised."""
        scores, ids = logits / self._temperature, None
        if self._most is not None:
            ids = likeliest(scores, int(min(self._most, logits.shape[-1])))
            scores = mx.take_along_axis(scores, ids, axis=-1)
        probabilities = mx.softmax(scores, axis=-1)
        if ids is not None:
            probabilities = mx.where(mx.arange(ids.shape[-1]) < self._top_k, probabilities, 0.0)
            before = mx.cumsum(probabilities, axis=-1, inclusive=False)
            whole = probabilities.sum(axis=-1, keepdims=True)
            probabilities = mx.where(before < self._top_p * whole, probabilities, 0.0)
        if self._has_min_p:
            enough = probabilities >= self._min_p * probabilities.max(axis=-1, keepdims=True)
            probabilities = mx.where(enough, probabilities, 0.0)
        return ids, probabilities


def most_likely(logits: mx.array) -> mx.array:
    """Return the tokens (B,) with the largest logits (B, V)."""
    return mx.argmax(logits, axis=-1)


def likeliest(scores: mx.array, count: int) -> mx.array:
    """Return the tokens (B, count) with the largest scores (B, V), in their order."""
    if count == scores.shape[-1]:
        return mx.argsort(-scores, axis=-1)
    some = mx.argpartition(-scores, kth=count - 1, axis=-1)[:, :count]
    return mx.take_along_axis(some, mx.argsort(-mx.take_along_axis(scores, some, axis=-1), axis=-1), axis=-1)


def draw_places(probabilities: mx.array, draws: Sequence[float]) -> mx.array:
    """Return the places (B, 1) drawn by rows of probabilities (B, N), not normalised, with numbers in [0, 1)."""
    sums = mx.cumsum(probabilities, axis=-1)
    # The first place whose sum is above a share of the whole has a probability above 0.
    aim = mx.array([[min(draw, MOST_DRAW)] for draw in draws], dtype=mx.float32) * sums[:, -1:]
    return mx.minimum((sums <= aim).sum(axis=-1, keepdims=True), sums.shape[-1] - 1)


def adjusted(logits: mx.array, how: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> mx.array:
    """Return a row's logits (1, V) changed by its bias and its penalties."""
    factors = dict.fromkeys([*prompt, *answer], how.repetition_penalty or 1.0)
    added = dict(how.logit_bias)
    for token, count in Counter(answer).items():
        added[token] = added.get(token, 0.0) - count * how.frequency_penalty - how.presence_penalty
    changed = list(factors | added)
    factor = mx.array([[factors.get(token, 1.0) for token in changed]])
    more = mx.array([[added.get(token, 0.0) for token in changed]])
    at = mx.array([changed])
    found = mx.take_along_axis(logits, at, axis=-1)
    new = mx.where(found > 0, found / mx.maximum(factor, _LEAST_TEMPERATURE), found * factor) + more
    return mx.put_along_axis(logits, at, new, axis=-1)


class Scores(NamedTuple):
    """Log-probabilities by the model's distribution, without sampling settings, in nats."""

    of_token: mx.array  # (B,) of the given tokens
    best: mx.array  # (B, N) the most likely tokens, the likeliest first
    of_best: mx.array  # (B, N) theirs

    def read(self) -> list[tuple[float, list[tuple[int, float]]]]:
        """Return each token's log-probability and its (alternative, log-probability) pairs; waits for the device."""
        own, best, of_best = (np.asarray(part).tolist() for part in self)
        return [(score, list(zip(*pairs, strict=True))) for score, *pairs in zip(own, best, of_best, strict=True)]


def score_tokens(logits: mx.array, tokens: mx.array, most: int) -> Scores:
    """Return the log-probabilities of tokens (B,), and the `most` likely ones, by logits (B, V)."""
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    of_token = mx.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    best = likeliest(scores, min(most, logits.shape[-1])) if most else mx.zeros((len(tokens), 0), dtype=mx.uint32)
    return Scores(of_token, best, mx.take_along_axis(scores, best, axis=-1))


def make_draws(seed: int) -> np.random.Generator:
    """Return the generator of a row's draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


@dataclass
class Constraint:
    """The state of llguidance's grammar in one row, which masks what would violate it; other rows need a `copy`."""

    matcher: LLMatcher
    followed: int = 0  # Tokens of the answer that it consumed

    def copy(self) -> Constraint:
        """Return a copy in the same state."""
        return Constraint(self.matcher.deep_copy(), self.followed)

    def allowed(self, answer: Sequence[int], vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which tokens (V,) may follow an answer, which continues that of the last call."""
        for token in answer[self.followed :]:
            self.matcher.consume_token(token)
        self.followed = len(answer)
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        return np.pad(bits, (0, max(0, vocab_size - len(bits))))[:vocab_size].astype(np.bool_)


class JsonGrammars:
    """Creates constraints for one tokenizer, whose vocabulary is prepared once."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        """Answers end with one of the tokenizer's `ends`."""
        if isinstance(tokenizer, Tokenizer):
            from llguidance.tiktoken import lltokenizer_from_encoding

            self._tokenizer = lltokenizer_from_encoding(tokenizer.encoding, eos_token=[*tokenizer.ends])
        else:
            from llguidance.hf import from_tokenizer

            self._tokenizer = from_tokenizer(tokenizer.inner, eos_token=[*tokenizer.ends])

    def constraint(self, schema: dict[str, Any]) -> Constraint:
        """Return the constraint of a JSON Schema, {"type": "object"} for any object; raises ConfigError for others."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_SPACING)
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be used: {matcher.get_error()}")
        return Constraint(matcher)
