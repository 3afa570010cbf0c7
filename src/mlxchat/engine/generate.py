"""The engine: batches of prompts in, tokens out one column at a time, with the calculator in the loop.

Counterpart of nanochat/engine.py. A row ends with <|assistant_end|> or <|bos|>. When the model closes a call with
<|python_end|>, the calculator's answer is forced into the row; forced tokens have mask 0 and are never trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.kv_cache import KVCache
from mlxchat.engine.sample import sample_tokens, split_keys
from mlxchat.engine.tools import calculate
from mlxchat.model.gpt import GPT
from mlxchat.ops import blas

# Thin products are fastest on one core: waiting BLAS threads spin.
_ROWS_WORTH_ALL_CORES = 32


@dataclass
class Completion:
    """What one row generated."""

    ids: list[int] = field(default_factory=list)
    """Generated ids, the final <|assistant_end|> included."""
    mask: list[int] = field(default_factory=list)
    """1 where the id was sampled, 0 where it was forced."""
    finished: bool = False
    """Whether the row ended by itself."""

    def text(self, tokenizer: Tokenizer) -> str:
        """Return what was said: the token that ended it is no part of the answer that tasks judge."""
        return tokenizer.decode(self.ids[:-1] if self.finished else self.ids)


@dataclass
class _Row:
    """The state of one prompt."""

    completion: Completion = field(default_factory=Completion)
    forced: deque[int] = field(default_factory=deque)
    call: list[int] | None = None


class Engine:
    """A model that answers."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Take a model with its tokenizer."""
        self.model, self.tokenizer = model, tokenizer

    def complete(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Return one completion per prompt; the arguments are `stream`'s."""
        rows: list[Completion] = [Completion() for _ in prompts]
        for column in self.stream(
            prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        ):
            for index, token, sampled in column:
                rows[index].ids.append(token)
                rows[index].mask.append(sampled)
        for row in rows:
            row.finished = bool(row.ids) and row.ids[-1] in self._ends()
        return rows

    def stream(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Yield columns of (row, id, mask), one entry per row that is not finished.

        Args:
            prompts: token ids, of any lengths.
            max_new_tokens: per row, forced ones included.
            temperature: 0 is greedy.
            top_k: draw among the k most likely; None: all.
            seed: of the draws; or one for each prompt, whose draws then depend on no other prompt.
        """
        tokenizer, special = self.tokenizer, self.tokenizer.special_ids
        rows = [_Row() for _ in prompts]
        active = list(range(len(prompts)))
        cache = KVCache(self.model.sizes, [len(prompt) for prompt in prompts])
        longest = max(len(prompt) for prompt in prompts)
        ids = mx.array([[tokenizer.bos] * (longest - len(prompt)) + prompt for prompt in prompts])
        keys = mx.random.key(seed) if isinstance(seed, int) else mx.stack([mx.random.key(each) for each in seed])
        threads = blas.blas_threads()
        try:
            for _ in range(max_new_tokens):
                if threads is not None and ids.shape[1] == 1 and len(active) < _ROWS_WORTH_ALL_CORES:
                    blas.set_blas_threads(1)
                keys, key = split_keys(keys)
                logits = self._last_logits(ids, cache)
                drawn = np.asarray(sample_tokens(logits, temperature=temperature, top_k=top_k, key=key))
                column, going = [], []
                for place, index in enumerate(active):
                    row = rows[index]
                    sampled = 0 if row.forced else 1
                    token = row.forced.popleft() if row.forced else int(drawn[place])
                    column.append((index, token, sampled))
                    row.completion.ids.append(token)
                    self._advance(row, token, special)
                    if token not in self._ends():
                        going.append(place)
                yield column
                if not going:
                    return
                if len(going) < len(active):
                    cache.keep_rows(mx.array(going))
                    keys = keys if keys.ndim == 1 else keys[mx.array(going)]
                    active = [active[place] for place in going]
                ids = mx.array([[rows[index].completion.ids[-1]] for index in active])
        finally:
            if threads is not None:
                blas.set_blas_threads(threads)

    def _last_logits(self, ids: mx.array, cache: KVCache) -> mx.array:
        """Return the logits (B, V) after the last of `ids`."""
        return self.model.logits(self.model.hidden(ids, cache)[:, -1])

    def _ends(self) -> tuple[int, int]:
        return self.tokenizer.assistant_end, self.tokenizer.bos

    def _advance(self, row: _Row, token: int, special: dict[str, int]) -> None:
        """Follow the calculator's protocol: collect a call, and queue its answer when it closes."""
        if token == special["<|python_start|>"]:
            row.call = []
        elif token == special["<|python_end|>"] and row.call is not None:
            answer = calculate(self.tokenizer.decode(row.call))
            row.call = None
            if answer is not None:
                output = self.tokenizer.encode(answer)
                row.forced.extend([special["<|output_start|>"], *output, special["<|output_end|>"]])
        elif row.call is not None:
            row.call.append(token)
