"""Constrained decoding by JSON Schema: tokens that would violate it are masked before each draw.

The grammar is llguidance's, which computes a mask in well under a millisecond.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from mlxchat.engine.third_party import AnyTokenizer

# Spaces as in json.dumps. With free white space a small model may fill its answer with line breaks.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass
class Constraint:
    """The grammar's state in one row; other rows need a `copy`."""

    matcher: LLMatcher
    followed: int = 0
    """Tokens of the answer that it consumed."""

    def copy(self) -> Constraint:
        """Return a copy in the same state."""
        return Constraint(self.matcher.deep_copy(), self.followed)

    def allowed(self, answer: Sequence[int], vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which tokens (V,) may follow an answer, which continues that of the last call.

        End tokens may once the text is complete. A grammar that exceeds llguidance's limits allows only these.
        """
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
            from llguidance.tiktoken import lltokenizer_from_encoding  # takes 20 ms, which few commands need

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
