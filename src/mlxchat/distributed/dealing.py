"""How rows are dealt to ranks so that all finish at about the same time."""

from __future__ import annotations

from collections.abc import Sequence


def deal_padded(lengths: Sequence[int], parts: int) -> list[slice]:
    """Return contiguous parts of rows, of which the costliest costs as little as can be; some may be empty.

    A part costs its rows times its longest, since rows are filled up to one length. So rows of similar length should
    stand together.

    Args:
        lengths: of the rows, in tokens.
        parts: how many, at least 1.
    """
    low, high = max(lengths, default=0), len(lengths) * max(lengths, default=0)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(lengths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    found = _filled(lengths, high)
    return found + [slice(len(lengths), len(lengths))] * (parts - len(found))


def _filled(lengths: Sequence[int], most: int) -> list[slice]:
    """Return the fewest parts of which none costs more than `most`, which is no less than a row."""
    found: list[slice] = []
    start = longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if longest * (place + 1 - start) > most:
            found.append(slice(start, place))
            start, longest = place, length
    return [*found, slice(start, len(lengths))] if start < len(lengths) else found
