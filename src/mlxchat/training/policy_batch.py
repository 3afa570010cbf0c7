"""Sampled answers as rows: what is scored, and what `TrainStep` trains on."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxchat.data.packing import IGNORED, Ints
from mlxchat.engine.generate import Completion
from mlxchat.training.step import Batch

Floats = np.ndarray[Any, np.dtype[np.float64]]

_WIDTH_STEP = 32
_ROWS_STEP = 16


def sampled_mask(completions: list[Completion]) -> Floats:
    """Return (B, L): 1 where a completion's token was sampled, 0 where it was forced or there is none."""
    mask = np.zeros((len(completions), max((len(row.ids) for row in completions), default=0)))
    for row, completion in enumerate(completions):
        mask[row, : len(completion.mask)] = completion.mask
    return mask


def weighted_rows(prompts: list[list[int]], completions: list[Completion], weights: Floats, *, padding: int) -> Batch:
    """Return rows whose loss is Σ weight × cross-entropy over the completions' tokens.

    Rows without a weight change nothing and are left out. Few shapes, so that few are compiled.

    Args:
        prompts: token ids, each with one completion.
        completions: what was generated.
        weights: (B, L), of the completions' tokens.
        padding: token id.
    """
    useful = [index for index in range(len(prompts)) if weights[index].any()]
    longest = max((len(prompts[index]) + len(completions[index].ids) for index in useful), default=_WIDTH_STEP)
    width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
    height = max(_ROWS_STEP, -(-len(useful) // _ROWS_STEP) * _ROWS_STEP)
    ids = np.full((height, width + 1), padding, dtype=np.int32)
    placed = np.zeros((height, width + 1), dtype=np.float32)
    for row, index in enumerate(useful):
        prompt, completion = prompts[index], completions[index]
        end = len(prompt) + len(completion.ids)
        ids[row, :end] = [*prompt, *completion.ids]
        placed[row, len(prompt) : end] = weights[index, : len(completion.ids)]
    targets = np.where(placed[:, 1:] != 0, ids[:, 1:], IGNORED).astype(np.int32)
    return Batch(ids[:, :-1], targets, placed[:, 1:])


def scored_rows(prompts: list[list[int]], completions: list[Completion], *, padding: int) -> tuple[Ints, Ints]:
    """Return ids and targets (B, T) of all rows; the targets are the sampled tokens, others are ignored."""
    longest = max(len(prompt) + len(row.ids) for prompt, row in zip(prompts, completions, strict=True))
    width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
    ids = np.full((len(prompts), width + 1), padding, dtype=np.int32)
    targets = np.full((len(prompts), width + 1), IGNORED, dtype=np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion.ids)
        ids[row, :end] = [*prompt, *completion.ids]
        targets[row, len(prompt) : end] = np.where(completion.mask, completion.ids, IGNORED)
    return ids[:, :-1], targets[:, 1:]


def of_completions(found: Floats, prompts: list[list[int]], completions: list[Completion]) -> Floats:
    """Return numbers of `scored_rows`' targets (B, T) as those of the completions' tokens (B, L)."""
    placed = np.zeros((len(prompts), max(len(row.ids) for row in completions)))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt) - 1  # a target stands where it is predicted
        placed[row, : len(completion.ids)] = found[row, start : start + len(completion.ids)]
    return placed
