"""A tokenizer.json of Hugging Face's, as far as tiktoken can do what it does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlxchat.data.byte_level import (
    GPT2_PATTERN,
    HF_FILE,
    POSSESSIVE_INTERVAL,
    RANKS_FILE,
    Vocabulary,
    byte_letters,
    split_token,
)  # fmt: skip
from mlxchat.errors import DataError


def hf_file(path: Path) -> Path | None:
    """Return the tokenizer.json that a source means; a folder's ranks are preferred to it."""
    if path.is_dir():
        return path / HF_FILE if (path / HF_FILE).exists() and not (path / RANKS_FILE).exists() else None
    return path if path.suffix == ".json" else None


def hf_record(path: Path) -> dict[str, Any]:
    """Return a tokenizer.json, if what it does to a text is what tiktoken can do."""
    file = hf_file(path)
    assert file is not None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        model = record["model"]
        kind = model.get("type", "BPE")
        assert isinstance(model.get("vocab", {}), dict)
        normalizer = record["normalizer"]["type"] if record.get("normalizer") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise DataError(f"{file}: no readable tokenizer.json ({error!r})") from None
    problems = [
        *([f"its model is {kind}, expected BPE"] if kind != "BPE" or "merges" not in model else []),
        *([f"it normalises text ({normalizer})"] if normalizer else []),
        *(
            f"it has a {key}"
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if model.get(key)
        ),
    ]
    if problems:
        raise DataError(f"{file} cannot be taken over: {'; '.join(problems)}")
    return dict(record)


def hf_merges(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the pairs that are merged, in order."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in record["model"]["merges"]]


def hf_special_names(source: str, record: Mapping[str, Any]) -> set[str]:
    """Return the names of the source's own special tokens, which ours replace."""
    added = record.get("added_tokens") or []
    cut = [token["content"] for token in added if not token.get("special")]
    if cut:
        raise DataError(f"{source} cannot be taken over: it cuts {cut[0]!r} and {len(cut) - 1} others out of any text")
    return {token["content"] for token in added}


def hf_pattern(source: str, record: Mapping[str, Any]) -> str:
    """Return how a tokenizer.json cuts text, in tiktoken's words."""
    outer = record.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        cut = steps[0]
        wanted = (cut.get("behavior"), bool(cut.get("invert"))) in (("Isolated", False), ("Removed", True))
        pattern = cut.get("pattern", {}).get("Regex")
        if len(steps) == 2 and cut.get("type") == "Split" and wanted and pattern and not last.get("use_regex", True):
            if POSSESSIVE_INTERVAL.search(pattern):  # repeats the group there, and never goes back here
                raise DataError(f"{source} cannot be taken over: tiktoken reads its pattern otherwise ({pattern})")
            return str(pattern)
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise DataError(
        f"{source} cannot be taken over: it cuts text by {kinds}, expected ByteLevel without a space in front, alone "
        "or after one Split by a regular expression"
    )


def assemble(
    where: str, vocab: Mapping[str, int], merges: Iterable[tuple[str, ...]], special: set[str], pattern: str
) -> Vocabulary:
    """Return the ordinary tokens in the order of their ids, if that is the order in which they are merged."""
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    ordered = sorted((rank, spelled) for spelled, rank in vocab.items() if spelled not in special)
    try:
        tokens = [bytes(bytes_of[letter] for letter in spelled) for _, spelled in ordered]
        results = [bytes(bytes_of[letter] for letter in left + right) for left, right in merges]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{where} cannot be taken over: its tokens are not those of byte-level BPE ({error})") from None
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{where} cannot be taken over: it must hold all 256 bytes, and no token twice")
    order = [ranks.get(token, -1) for token in results]
    if -1 in order or any(second < first for first, second in pairwise(order)):
        raise DataError(
            f"{where} cannot be taken over: its merges are not in the order of its ids, which tiktoken needs"
        )
    keeps_ids = all(rank == place for place, (rank, _) in enumerate(ordered))
    return Vocabulary(ranks, pattern, keeps_ids)


def check_merges(source: str, ranks: Mapping[bytes, int], merges: Iterable[tuple[str, ...]]) -> None:
    """Refuse tokens that the source would merge from other pairs than tiktoken does."""
    letters = byte_letters()
    given = {(left, right) for left, right in merges}
    for token in ranks:
        if len(token) > 1:
            left, right = ("".join(letters[byte] for byte in part) for part in split_token(token, ranks))
            if (left, right) not in given:
                raise DataError(
                    f"{source} cannot be taken over: its merges do not lead to {token!r} as tiktoken's would"
                )
