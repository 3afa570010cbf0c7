"""How rows are dealt to ranks."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest

from mlxchat.distributed.group import deal_padded


def cost(lengths: list[int]) -> int:
    return len(lengths) * max(lengths, default=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_costliest_part_is_as_cheap_as_any_contiguous_dealing_makes_it(parts: int) -> None:
    rng = np.random.default_rng(parts)
    for count in range(9):
        lengths = rng.integers(1, 40, count).tolist()
        dealt = deal_padded(lengths, parts)
        assert len(dealt) == parts
        assert [length for part in dealt for length in lengths[part]] == lengths
        borders = [(0, *cuts, count) for cuts in combinations_with_replacement(range(count + 1), parts - 1)]
        best = min(max(cost(lengths[start:stop]) for start, stop in pairwise(cuts)) for cuts in borders)
        assert max(cost(lengths[part]) for part in dealt) == best


def test_equal_rows_are_dealt_evenly_and_too_few_leave_ranks_without() -> None:
    assert [len(range(9)[part]) for part in deal_padded([5] * 9, 2)] == [5, 4]
    assert [len(range(2)[part]) for part in deal_padded([5] * 2, 3)] == [1, 1, 0]


def test_rows_of_no_length_are_dealt_too() -> None:
    """Padding alone, as the last rows of a validation may be."""
    assert [len(range(3)[part]) for part in deal_padded([0, 0, 0], 2)] == [3, 0]
