"""Rows in which several continuations share one prefix, which is computed once.

A row is its trunk followed by its branches. A branch's tokens attend to the trunk and to their own branch, at the
positions they would have right after the trunk, so results equal those of each sequence alone. Rows of similar length
are batched.

Shapes: B rows, T tokens of the longest row, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.evals.core_questions import common_prefix
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.attention import Positions, causal_attention, masked_attention

Ints = np.ndarray[Any, np.dtype[np.int32]]

# Groups with a common prefix share a row if that saves at least this fraction of the added group's tokens.
_WORTHWHILE = 0.25
_MOST_ROW_TOKENS = 4096
# A batch of at least so many tokens takes only rows of at least this fraction of its longest row.
_ENOUGH_TOKENS, _LEAST_FILL = 2048, 0.85
# Attention scores outside the trunk per token of a batch: as in a plain row of 512 tokens.
_SCORES_PER_TOKEN = 512


@dataclass(frozen=True)
class Continuation:
    """Token ids; those from `start` on are scored."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class Row:
    """A trunk with branches, one for each sequence."""

    trunk: list[int]
    branches: list[list[int]]
    groups: list[int]
    """Group of each sequence; sequences of a group keep their order."""
    starts: list[int]
    targets: list[list[int]]
    """Scored token ids of each sequence."""

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.trunk) + sum(map(len, self.branches))

    def columns(self) -> list[Ints]:
        """Return for each sequence the columns after which its targets are predicted."""
        found, first = [], len(self.trunk)
        for branch, start, targets in zip(self.branches, self.starts, self.targets, strict=True):
            place = np.arange(start - 1, start - 1 + len(targets), dtype=np.int32)
            found.append(np.where(place < len(self.trunk), place, place - len(self.trunk) + first))
            first += len(branch)
        return found


def make_rows(groups: Sequence[Sequence[Continuation]], most_tokens: int) -> list[Row]:
    """Return rows that hold each group whole; groups with a long common prefix share a row.

    Args:
        groups: the options of each example.
        most_tokens: limit of a row that holds several groups.
    """
    limit = min(most_tokens, _MOST_ROW_TOKENS)
    rows: list[list[int]] = []
    shared = cost = 0
    for number in sorted(range(len(groups)), key=lambda each: groups[each][0].tokens):
        group = groups[number]
        own, own_cost = _cost(group)
        if rows:
            last = [continuation for member in rows[-1] for continuation in groups[member]]
            together = min(shared, own, common_prefix([last[0].tokens[:-1], group[0].tokens[:-1]]))
            # Each branch grows by what the trunk loses.
            merged = cost + shared * (len(last) - 1) + own_cost + own * (len(group) - 1)
            merged -= together * (len(last) + len(group) - 1)
            if cost + own_cost - merged >= _WORTHWHILE * own_cost and merged <= limit:
                rows[-1].append(number)
                shared, cost = together, merged
                continue
        rows.append([number])
        shared, cost = own, own_cost
    return [_row([(member, each) for member in members for each in groups[member]]) for members in rows]


def make_batches(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Return the rows in batches of similar length, the longest first.

    Args:
        rows: to batch.
        batch_tokens: limit of a batch, padding included; a longer row is a batch alone.
    """
    batches: list[list[Row]] = []
    border = longest = 0
    for row in sorted(rows, key=lambda each: (-each.num_tokens, -len(each.trunk), each.groups)):
        if batches:
            count, least = len(batches[-1]) + 1, min(border, len(row.trunk))
            area = count * longest * (longest - least)
            fits = count * longest <= batch_tokens and area <= batch_tokens * _SCORES_PER_TOKEN
            if fits and (count * longest <= _ENOUGH_TOKENS or row.num_tokens >= _LEAST_FILL * longest):
                batches[-1].append(row)
                border = least
                continue
        batches.append([row])
        border, longest = len(row.trunk), row.num_tokens
    return batches


class Branches:
    """The cache argument of `GPT.hidden` that computes a batch of rows as trunks with branches."""

    def __init__(self, rows: Sequence[Row], sizes: GPTSizes, padding: int) -> None:
        """Stack the rows, padded at the right with the id `padding`."""
        longest = max(1, *(row.num_tokens for row in rows))
        ids = np.full((len(rows), longest), padding, np.int32)
        branch = np.full((len(rows), longest), -1, np.int32)
        position = np.zeros((len(rows), longest), np.int32)
        before = np.zeros((len(rows), longest), np.int32)
        for place, row in enumerate(rows):
            end, first = 0, len(row.trunk)
            for number, tokens in enumerate([row.trunk, *row.branches]):
                columns = slice(end, end + len(tokens))
                ids[place, columns], branch[place, columns] = tokens, number
                begin = first if number else 0
                position[place, columns] = np.arange(begin, begin + len(tokens))
                before[place, columns] = np.arange(end - 1, end + len(tokens) - 1)
                if number and tokens:
                    before[place, end] = first - 1
                end += len(tokens)
        self.ids = mx.array(ids)
        border = min(len(row.trunk) for row in rows)
        self._before, self._starts = mx.array(np.maximum(before, 0)), mx.array(before < 0)
        offset: int | Positions = 0
        visible = None
        if border < longest:
            positions, numbers = mx.array(position), mx.array(branch)
            offset = Positions(positions, int(position.max()) + 1)
            own, own_number = positions[:, border:, None], numbers[:, border:, None]
            key, key_number = positions[:, None], numbers[:, None]
            visible = ((key_number == 0) | (key_number == own_number)) & (key <= own)
            self._distance = own - key
        self._branching = border < longest
        # A window longer than every sequence has no effect.
        windows = (None if window is None or window > position.max() else window for window in sizes.windows())
        self.layers = [_BranchedLayer(border, visible, window, offset, self) for window in windows]

    def shift(self, x: mx.array) -> mx.array:
        """Return x (B, T, C) moved on by one: in each place what precedes it in its branch, in a row's first zeros."""
        if not self._branching:
            return mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        before = mx.take_along_axis(x, self._before[..., None], axis=1)
        return mx.where(self._starts[..., None], 0, before).astype(x.dtype)

    def near(self, window: int) -> mx.array:
        """Return (B, T − border, T): True where a key is within the window."""
        return self._distance <= window


class _BranchedLayer:
    """Attention of one layer: causal in the columns where all rows have trunk, masked in the others."""

    def __init__(
        self, border: int, visible: mx.array | None, window: int | None, offset: int | Positions, branches: Branches
    ) -> None:
        self._border, self._window, self.offset = border, window, offset
        if visible is not None and window is not None:
            visible = visible & branches.near(window)
        self._visible = visible

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Return (B, H, T, D) of q (B, H, T, D), k and v (B, K, T, D)."""
        border, parts = self._border, []
        if border:
            parts.append(causal_attention(q[:, :, :border], k[:, :, :border], v[:, :, :border], self._window))
        if self._visible is not None:
            parts.append(masked_attention(q[:, :, border:], k, v, self._visible))
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)).swapaxes(1, 2)


def _cost(group: Sequence[Continuation]) -> tuple[int, int]:
    """Return the length of the common prefix, and the tokens to compute if the prefix is computed once."""
    # The last token is only predicted.
    inputs = [continuation.tokens[:-1] for continuation in group]
    shared = common_prefix(inputs)
    return shared, shared + sum(len(tokens) - shared for tokens in inputs)


def _row(members: Sequence[tuple[int, Continuation]]) -> Row:
    shared, _ = _cost([continuation for _, continuation in members])
    return Row(
        trunk=members[0][1].tokens[:shared],
        branches=[continuation.tokens[shared:-1] for _, continuation in members],
        groups=[group for group, _ in members],
        starts=[continuation.start for _, continuation in members],
        targets=[continuation.tokens[continuation.start :] for _, continuation in members],
    )
