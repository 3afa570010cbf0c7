"""nanochat's tokenizer.pkl, a pickled tiktoken encoding, and token_bytes.pt beside it; neither runs anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from mlxchat.errors import DataError
from mlxchat.interop.pickled import MOST_BYTES, Made, Maker, brief, read_pickle
from mlxchat.interop.torch_file import TorchFile, TorchTensor

_WHAT = "a tokenizer of nanochat's"
_NAMES = {("tiktoken.core", "Encoding"): Maker(Made), ("tiktoken", "Encoding"): Maker(Made)}


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.pkl: its tokens, how it cuts text, nanochat's special tokens after them.

    Raises:
        DataError: it is no such file, it is damaged, or it has other special tokens.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    where = path.name
    if data.startswith(b"version https://git-lfs"):
        raise DataError(f"{where} is a pointer of Git LFS, not the file itself. Get that with: git lfs pull")
    content = read_pickle(data, _NAMES, where=where, what=_WHAT)
    state = content.state if isinstance(content, Made) else None
    if isinstance(state, str):
        raise DataError(
            f"{where} only names the encoding {brief(state)!r} and holds no vocabulary. Save the model's own tokenizer"
        )
    if not isinstance(state, dict):
        raise DataError(f"{where} is not {_WHAT}: it holds no tiktoken encoding")
    ranks, special, pattern = (state.get(key) for key in ("mergeable_ranks", "special_tokens", "pat_str"))
    if not isinstance(ranks, dict) or not isinstance(special, dict) or not isinstance(pattern, str):
        raise DataError(f"{where} is not {_WHAT}: it lacks tokens, special tokens or how text is cut")
    _check_ranks(ranks, where)
    check_special_tokens(special, len(ranks), where)
    try:
        vocabulary = Vocabulary(ranks, pattern)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Tokenizer(vocabulary.ranks, vocabulary.pattern)


def check_special_tokens(special: dict[str, Any], num_tokens: int, where: str) -> None:
    """Refuse special tokens that are not nanochat's, right after the others and in its order.

    Raises:
        DataError: naming the first that differs.
    """
    expected = {name: num_tokens + index for index, name in enumerate(SPECIAL_TOKENS)}
    for name in sorted(expected.keys() | special.keys(), key=str):
        if expected.get(name) != special.get(name):
            raise DataError(
                f"{where}: the special token {brief(name)} has id {brief(special.get(name))}, expected "
                f"{expected.get(name)}. Only nanochat's nine special tokens, after all others, are read"
            )


def check_token_bytes(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse a token_bytes.pt that is not of this tokenizer: then model and tokenizer may not belong together.

    Tokens that are no UTF-8 by themselves count as their bytes (nanochat since 2026) or as U+FFFD (before).

    Raises:
        DataError: it is damaged, or of another tokenizer.
    """
    with TorchFile(path) as file:
        content = file.content
        whole = isinstance(content, TorchTensor) and len(content.shape) == 1 and content.dtype.numpy[1] == "i"
        if not whole:
            raise DataError(f"{path.name} holds no list of whole numbers, as nanochat's does")
        raw = tokenizer.token_bytes.astype(np.int64)
        # The file may be of any size: it is read only if it has as many numbers as there are tokens.
        given = file.numbers(content).astype(np.int64) if content.shape == raw.shape else None
    if given is not None:
        decoded = np.zeros_like(raw)
        for token, rank in tokenizer.ranks.items():
            decoded[rank] = len(token.decode("utf-8", "replace").encode())
        differs = np.flatnonzero((given != raw) & (given != decoded))
        if not len(differs):
            return
        at = int(differs[0])
        reason = f"token {at} has {given[at]} bytes in the one and {raw[at]} in the other"
    else:
        reason = f"{content.count:,} tokens in the one, {len(raw):,} in the other"
    raise DataError(
        f"{path.name} and tokenizer.pkl do not belong together ({reason}). Take both from where the model was trained"
    )


def _check_ranks(ranks: dict[Any, Any], where: str) -> None:
    numbers = [rank for rank in ranks.values() if type(rank) is int]
    tokens = all(type(token) is bytes and token for token in ranks)
    if not tokens or sorted(numbers) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{where} is damaged: ids must be 0 … n − 1, and the 256 bytes among the tokens")
