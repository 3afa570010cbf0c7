"""A model as evaluations use it, ours or a third party's: its engine renders and completes, and it scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxchat.engine.generate import Engine
from mlxchat.engine.third_party import AnyTokenizer, ThirdPartyEngine
from mlxchat.errors import DataError
from mlxchat.model.scoring import Floats, ScoredRow, score_rows
from mlxchat.ops.loss import Kind

# Of third-party models, whose size is unknown; their logits are computed for every position.
_MOST_TOKENS, _MOST_LOGITS = 4096, 1 << 27


class LanguageModel:
    """A loaded model with its tokenizer."""

    def __init__(self, engine: Engine, *, batch_tokens: int | None = None) -> None:
        """Keep an engine, and the tokens of a forward pass that scores; None: what a third-party model may take."""
        self.engine, self.context_tokens = engine, engine.context_tokens
        self.tokenizer: AnyTokenizer = engine.tokenizer
        self.is_ours = not isinstance(engine, ThirdPartyEngine)
        self.batch_tokens = batch_tokens or min(_MOST_TOKENS, _MOST_LOGITS // engine.tokenizer.vocab_size)

    def score(self, rows: Sequence[ScoredRow], kinds: Sequence[Kind] = ("losses",)) -> list[Floats]:
        """Return the scores (K, n) of each row; see `score_rows`."""
        return score_rows(self.engine.model, rows, kinds, batch_tokens=self.batch_tokens, team=self.engine.team)

    def letter_logits(self, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the logits of each prompt's letters as its next token; raises DataError if letters share a token."""
        rows = []
        for prompt, offered in zip(prompts, letters, strict=True):
            tokens = [self.tokenizer.encode(letter) for letter in offered]
            targets = np.array([each[-1] for each in tokens], np.int32)  # SentencePiece may add a token for the space
            if (self.is_ours and any(len(each) != 1 for each in tokens)) or len({*targets.tolist()}) < len(targets):
                raise DataError(f"the letters {list(offered)} must be different single tokens of this tokenizer")
            rows.append(ScoredRow(np.array(prompt, np.int32), np.full(len(targets), len(prompt) - 1), targets))
        return [values[0].tolist() for values in self.score(rows, ("logits",))]
