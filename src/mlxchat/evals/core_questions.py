"""A CORE example as token sequences: prompts with few-shot examples, and the scored positions.

Counterpart of the prompts, draws and spans of nanochat/core_eval.py. A sequence begins with <|bos|>. Position p is
predicted from p − 1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from mlxchat.engine.batch import common_prefix
from mlxchat.errors import DataError
from mlxchat.evals.core_bundle import CoreTask
from mlxchat.evals.language_model import AnyTokenizer
from mlxchat.model.scoring import ScoredRow, continuation

FEWSHOT_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Question:
    """One example, ready for a model."""

    index: int
    """Place among the task's examples."""
    sequences: list[list[int]]
    """Token ids of each option; one sequence for language modelling."""
    starts: list[int]
    """First scored position of each sequence."""
    gold: int | None
    """The right option; None: the continuation itself is expected."""
    cropped: bool = False
    """Whether tokens were left out at the front."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    def rows(self) -> list[ScoredRow]:
        """Return each sequence with its scored tokens."""
        pairs = zip(self.sequences, self.starts, strict=True)
        return [continuation(tokens, max(1, start)) for tokens, start in pairs]


def draw_shots(index: int, count: int, shots: int) -> list[int]:
    """Return the indices of the few-shot examples for example `index` of `count`, as nanochat draws them.

    Raises:
        ValueError: there are fewer others than shots.
    """
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(count - 1), shots)
    return [place + (place >= index) for place in drawn]


def render_prompts(task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]]) -> list[str]:
    """Return the prompt of each option; of language modelling, the prompt without and with the continuation."""
    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n" for shot in shots)
        return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        before = "".join(
            f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}\n\n" for shot in shots
        )
        return [f"{before}{option}{delimiter}{item['continuation']}" for option in item["context_options"]]
    before = "".join(f"{str(shot['context']).strip()}{delimiter}{shot['continuation']}\n\n" for shot in shots)
    without = f"{before}{str(item['context']).strip()}{delimiter}"
    # Stripped, so that its tokens are a prefix of the other's.
    return [without.strip(), f"{without}{item['continuation']}"]


def tokenize_prompts(
    kind: str, prompts: list[str], encoder: AnyTokenizer, *, strict: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Return the sequences to compute and the first scored position of each.

    Multiple choice scores from where the options part; schemas score the common end; language modelling scores
    what the prompt without the continuation does not cover.

    Raises:
        DataError: strict, and the tokens of the prompt without the continuation are not a proper prefix of the other's
            (nanochat fails there). Otherwise scoring starts where they differ.
    """
    sequences = [[encoder.bos, *encoder.encode(prompt)] for prompt in prompts]
    if kind == "language_modeling":
        without, whole = sequences
        start = common_prefix(sequences)
        if strict and (start < len(without) or start == len(whole)):
            raise DataError("the prompt without the continuation must be a prefix of the one with it, in tokens")
        return [whole], [start]
    if kind == "schema":
        length = common_prefix([sequence[::-1] for sequence in sequences])
        return sequences, [len(sequence) - length for sequence in sequences]
    return sequences, [common_prefix(sequences)] * len(sequences)


def crop(sequences: list[list[int]], starts: list[int], limit: int) -> tuple[list[list[int]], list[int], bool]:
    """Return sequences of at most `limit` tokens, their first scored positions, and whether anything was cut.

    Tokens are dropped at the front, of each option its own excess, as in nanochat; scored tokens that are dropped do
    not count. At least one token of context and one to score remain.
    """
    cuts = [min(max(0, len(sequence) - limit), max(0, len(sequence) - 2)) for sequence in sequences]
    kept = [sequence[cut:] for sequence, cut in zip(sequences, cuts, strict=True)]
    return kept, [max(1, start - cut) if cut else start for start, cut in zip(starts, cuts, strict=True)], any(cuts)


def build_question(
    task: CoreTask, items: list[dict[str, Any]], index: int, encoder: AnyTokenizer, limit: int | None = None
) -> Question:
    """Return example `index` of a task with its shots before it, cropped to `limit` tokens."""
    shots = [items[place] for place in draw_shots(index, len(items), task.num_fewshot)]
    item = items[index]
    sequences, starts = tokenize_prompts(task.kind, render_prompts(task, item, shots), encoder)
    cropped = False
    if limit is not None:
        sequences, starts, cropped = crop(sequences, starts, limit)
    gold = None if task.kind == "language_modeling" else int(item["gold"])
    return Question(index=index, sequences=sequences, starts=starts, gold=gold, cropped=cropped)
