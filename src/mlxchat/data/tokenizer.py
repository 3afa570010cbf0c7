"""The tokenizer: byte-pair encoding, trained by rustbpe, applied by tiktoken, saved without pickle.

Counterpart of nanochat/tokenizer.py. Files of an artifact: ranks.tiktoken (base64 token and rank per line, the
truth), tokenizer.json and tokenizer_config.json (the same for the Hugging Face ecosystem), token_bytes.safetensors.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from safetensors.numpy import save_file

from mlxchat.errors import DataError

# GPT-4's, but with digits in groups of at most two: a small vocabulary should not spend itself on numbers.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
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
FILES = ("ranks.tiktoken", "tokenizer.json", "tokenizer_config.json", "token_bytes.safetensors")

_CHAT_TEMPLATE = """{{- '<|bos|>' -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user_start|>' + ns.system + message['content'] + '<|user_end|>' -}}{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant_start|>' + message['content'] + '<|assistant_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}"""


class Tokenizer:
    """Text to token ids and back. Special tokens have the highest ids, in the order of SPECIAL_TOKENS."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """Take the mergeable ranks: token bytes → id, 0 … n − 1, the 256 bytes among them."""
        self.ranks = ranks
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            name="mlxchat", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
        self.bos = self.special_ids["<|bos|>"]
        self.assistant_end = self.special_ids["<|assistant_end|>"]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. What looks like a special token in it is ordinary text."""
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.uint32]]]:
        """Return each document's ids, with <|bos|> in front. Other threads run meanwhile."""
        # Without lists of Python numbers it takes half the time, and most of that without Python's lock.
        encoded = (self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts)
        return [np.concatenate((np.array([self.bos], dtype=np.uint32), ids)) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids."""
        return self.encoding.decode_bytes(list(ids))

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that decides how a text is encoded, in hex."""
        lines = [
            SPLIT_PATTERN,
            *SPECIAL_TOKENS,
            *(token.hex() for token in sorted(self.ranks, key=self.ranks.__getitem__)),
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Raw bytes of each id, 0 for special tokens: (vocab_size,)."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def save(self, folder: Path) -> None:
        """Write FILES."""
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered]
        (folder / "ranks.tiktoken").write_text("".join(lines), encoding="ascii")
        (folder / "tokenizer.json").write_text(json.dumps(self._to_hf(), ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": "<|bos|>",
                    "eos_token": "<|assistant_end|>",
                    "additional_special_tokens": list(SPECIAL_TOKENS),
                    "clean_up_tokenization_spaces": False,
                    "chat_template": _CHAT_TEMPLATE,
                },
                indent=1,
            ),
            encoding="utf-8",
        )
        save_file({"token_bytes": self.token_bytes}, folder / "token_bytes.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a tokenizer from a tokenizer or checkpoint artifact.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = folder / "ranks.tiktoken"
        try:
            pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no readable tokenizer ({error})") from None
        whole = len(ranks) == len(pairs) and sorted(ranks.values()) == list(range(len(ranks)))
        if not whole or any(bytes([byte]) not in ranks for byte in range(256)):
            raise DataError(f"{path}: ranks must be 0 … n − 1 and hold all 256 bytes; the file is damaged")
        return cls(ranks)

    def _to_hf(self) -> dict[str, Any]:
        """Return the same tokenizer as a Hugging Face tokenizer.json: byte-level BPE with merges."""
        letters = _byte_letters()

        def spell(token: bytes) -> str:
            return "".join(letters[byte] for byte in token)

        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": rank, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": True,
                }
                for name, rank in self.special_ids.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {spell(token): rank for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])},
                "merges": [[spell(left), spell(right)] for left, right in self._merges()],
            },
        }  # fmt: skip

    def _merges(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the pair that each token above the bytes was merged from, by applying the earlier merges to it."""
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            if len(token) == 1:
                continue
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                ranked = [(self.ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
                _, best = min(ranked)
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            yield parts[0], parts[1]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on texts, most frequent pair first, until the vocabulary (special tokens included) is full.

    Raises:
        DataError: the text is too small for the vocabulary.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}, but the corpus yields only {len(ranks) + len(SPECIAL_TOKENS)} "
            "tokens. Lower it, or give more text."
        )
    return Tokenizer(ranks)


def _byte_letters() -> dict[int, str]:
    """Return the printable letter that byte-level BPE files write for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters
