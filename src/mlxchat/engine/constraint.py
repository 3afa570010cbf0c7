"""Constrained decoding by JSON Schema: tokens that would violate it are masked before each draw.

The grammar is llguidance's, which computes a mask in well under a millisecond.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxchat.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from mlxchat.engine.scheduler import TextTokenizer

Array = np.ndarray[Any, Any]
# Spaces as in json.dumps. With free white space a small model may fill its answer with line breaks.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """The grammar's state in one row; other rows need a `copy`."""

    def __init__(self, matcher: LLMatcher) -> None:
        """`matcher` is the state of a grammar."""
        self._matcher = matcher

    def copy(self) -> Constraint:
        """Return a copy in the same state."""
        return Constraint(self._matcher.deep_copy())

    def allowed(self, logits: Array) -> Array:
        """Return logits (V,) with -inf for forbidden tokens; end tokens are forbidden until the text is complete.

        A grammar that exceeds llguidance's limits allows only end tokens.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        mask = np.zeros(len(logits), dtype=bool)
        mask[: len(bits)] = bits[: len(logits)]
        return np.where(mask, logits, np.float32("-inf"))

    def follow(self, token: int) -> None:
        """Advance by the drawn token."""
        self._matcher.consume_token(token)


class JsonGrammars:
    """Creates constraints for one tokenizer, whose vocabulary is prepared once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Answers end with one of the tokenizer's `ends`."""
        from llguidance import LLTokenizer, TokenizerWrapper  # takes 20 ms, which few commands need

        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=[*tokenizer.ends])

    def constraint(self, schema: dict[str, Any]) -> Constraint:
        """Return the constraint of a JSON Schema; {"type": "object"} is any object.

        Raises:
            ConfigError: the schema is invalid, or llguidance does not support it.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_SPACING)
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be used: {matcher.get_error()}")
        return Constraint(matcher)


class _Vocabulary:
    """A tokenizer in llguidance's interface."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.ends[0], tokenizer.bos
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        special = {id_: name.encode() for name, id_ in tokenizer.special_ids.items()}
        self.tokens = [
            special[id_] if id_ in special else tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return self._tokenizer.encode(text)
