"""Byte-level byte-pair encoding on paper: how text is cut, how tokens are spelled, which pair each is merged from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

# GPT-4's, but with digits in groups of at most two: a small vocabulary should not spend itself on numbers.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
# As tiktoken writes them; they cut as the published ones do, with fewer steps back.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
RANKS_FILE, CONFIG_FILE, HF_FILE = "ranks.tiktoken", "tokenizer_config.json", "tokenizer.json"
PATTERN_KEY = "split_pattern"
"""In CONFIG_FILE: how text is cut; absent where it is nanochat's."""
POSSESSIVE_INTERVAL = re.compile(r"(\{\d+(?:,\d*)?\})\+")


@dataclass(frozen=True)
class Vocabulary:
    """Byte-level tokens, without special ones."""

    ranks: dict[bytes, int]
    """Token → id, 0 … n − 1 in the order of merging, the 256 bytes among them."""
    pattern: str
    """Regular expression, as tiktoken reads it, of the pieces within which tokens are merged."""
    keeps_ids: bool = True
    """Whether the ids are those of the source; False where special tokens of its own stood among them."""


def split_token(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the pair that a token of two bytes or more is merged from, by applying the earlier merges to it."""
    rank = ranks[token]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        _, best = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts)))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """Return the printable letter that byte-level BPE files write for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


def hf_pattern_of(pattern: str) -> str:
    """Return a pattern as Oniguruma reads it, where {1,3}+ would repeat the group."""
    return POSSESSIVE_INTERVAL.sub(r"\1", pattern)
