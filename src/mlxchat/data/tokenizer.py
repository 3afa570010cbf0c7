"""The tokenizer: byte-pair encoding, trained by rustbpe (`bpe.py`), applied by tiktoken, saved without pickle.

Counterpart of nanochat/tokenizer.py. Files of an artifact: ranks.tiktoken (base64 token and rank per line;
authoritative), tokenizer.json and tokenizer_config.json (the same for Hugging Face), token_bytes.safetensors.

A conversation becomes <|bos|>, then for the user <|user_start|> text <|user_end|>, for the assistant
<|assistant_start|> parts <|assistant_end|>. Its loss mask is 1 for the assistant's text, its calculator calls with
their delimiters, and <|assistant_end|>, and 0 for everything else, including a tool's output.
"""

from __future__ import annotations

import base64
import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from safetensors.numpy import save_file

from mlxchat.data import vocabulary as vocab
from mlxchat.data.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from mlxchat.errors import DataError
from mlxchat.tasks.base import Conversation, find_fault

FILES = (vocab.RANKS_FILE, vocab.HF_FILE, vocab.CONFIG_FILE, "token_bytes.safetensors")
_PART_CHARS = 50_000
Ids = np.ndarray[Any, np.dtype[np.uint32]]
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.txt").read_text(encoding="utf-8")


class Tokenizer:
    """Text to token ids and back. Special tokens have the highest ids, in the order of SPECIAL_TOKENS."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN) -> None:
        """Take ranks (bytes → id, 0 … n − 1, with all 256 bytes) and the regular expression that splits text."""
        self.ranks = ranks
        self.pattern = pattern
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        try:
            self.encoding = tiktoken.Encoding(
                name="mlxchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
            )
        except ValueError as error:
            raise DataError(f"{pattern} is not a regular expression that tiktoken reads ({error})") from None
        self.bos = self.special_ids["<|bos|>"]
        self.assistant_end = self.special_ids["<|assistant_end|>"]
        self.ends = (self.assistant_end, self.bos)
        """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Names of special tokens in it are ordinary text."""
        return list(self._encode(text).tolist())

    def encode_documents(self, texts: list[str]) -> list[Ids]:
        """Return each document's ids, with <|bos|> in front. Releases the interpreter's lock."""
        bos = np.array([self.bos], dtype=np.uint32)
        return [np.concatenate((bos, self._encode(text))) for text in texts]

    def _encode(self, text: str) -> Ids:
        # Arrays instead of lists halve the time, most of which then runs without the interpreter's lock.
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which encode_ordinary replaces
            return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32)
        except ValueError:  # hundreds of thousands of blanks exceed the pattern's backtracking limit
            parts = (text[start : start + _PART_CHARS] for start in range(0, len(text), _PART_CHARS))
            return np.concatenate([self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
        return self.encoding.decode(list(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids."""
        return self.encoding.decode_bytes(list(ids))

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that determines the encoding, in hexadecimal."""
        lines = [self.pattern, *SPECIAL_TOKENS, *(token.hex() for token in self._ordered())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Number of bytes of each id, 0 for special tokens: (vocab_size,)."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def save(self, folder: Path) -> None:
        """Write FILES."""
        lines = [f"{base64.b64encode(token).decode()} {self.ranks[token]}\n" for token in self._ordered()]
        (folder / vocab.RANKS_FILE).write_text("".join(lines), encoding="ascii")
        (folder / vocab.HF_FILE).write_text(json.dumps(self._to_hf(), ensure_ascii=False), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "pad_token": "<|assistant_end|>",
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        if self.pattern != SPLIT_PATTERN:
            config[vocab.PATTERN_KEY] = self.pattern
        (folder / vocab.CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file({"token_bytes": self.token_bytes}, folder / "token_bytes.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a tokenizer from a tokenizer or checkpoint artifact; raises DataError if it is damaged."""
        return cls(vocab.read_ranks(folder / vocab.RANKS_FILE), vocab.read_pattern(folder))

    def spelled(self) -> tuple[dict[str, int], list[list[str]]]:
        """Return token → id and the merges, in letters for bytes as GPT-2's files have them."""
        letters = vocab.byte_letters()

        def spell(token: bytes) -> str:
            return "".join(letters[byte] for byte in token)

        tokens = self._ordered()
        merges = [vocab.split_token(token, self.ranks) for token in tokens if len(token) > 1]
        vocabulary = {spell(token): self.ranks[token] for token in tokens}
        return vocabulary, [[spell(left), spell(right)] for left, right in merges]

    def _to_hf(self) -> dict[str, Any]:
        vocabulary, merges = self.spelled()
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        split = {"type": "Split", "pattern": {"Regex": vocab.hf_pattern_of(self.pattern)}}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": rank, "content": name, **special} for name, rank in self.special_ids.items()],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {**split, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
                **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
                "vocab": vocabulary,
                "merges": merges,
            },
        }

    def _ordered(self) -> list[bytes]:
        return sorted(self.ranks, key=self.ranks.__getitem__)


def load_vocabulary(source: str) -> tuple[Tokenizer, bool]:
    """Return a tokenizer with an existing vocabulary and our special tokens, and whether it keeps the source's ids."""
    vocabulary = vocab.read_vocabulary(source)
    return Tokenizer(vocabulary.ranks, vocabulary.pattern), vocabulary.keeps_ids


# Conversations

Content = str | list[dict[str, str]]
"""Of a message: text, or the parts of an answer."""

# Delimiters of each type of part, and its mask.
_PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = 2048
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and its loss mask (1: trained on), at most `max_tokens`; None: all.

    It is {"messages": [{"role", "content"}]}, user and assistant alternating. An optional system message in front is
    prepended to the first user message with an empty line.
    """
    messages: Any = conversation.get("messages")
    if fault := find_fault(messages, least=1):
        raise DataError(f"a conversation cannot be tokenized: {fault}")
    if messages[0]["role"] == "system":
        system, first, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    ids, mask = [tokenizer.bos], [0]
    special = tokenizer.special_ids

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            add([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], 0)
            continue
        add([special["<|assistant_start|>"]], 0)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            start, end, trained = _PARTS[part["type"]]
            tokens = tokenizer.encode(part["text"])
            add([special[start], *tokens, special[end]] if start and end else tokens, trained)
        add([special["<|assistant_end|>"]], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids that prompt the assistant for its next message; a final assistant message is dropped."""
    messages = conversation.get("messages") or []
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens=None)
    return [*ids, tokenizer.special_ids["<|assistant_start|>"]]


def fit_turns(
    messages: Sequence[Conversation], render: Callable[[list[Conversation]], list[int]], room: int
) -> tuple[list[int], int]:
    """Return the prompt without the oldest turns beyond `room`, and their number; system and last turn stay."""
    turns: list[int | None] = []
    turn = -1
    for message in messages:
        turn += message["role"] == "user"
        turns.append(None if message["role"] in ("system", "developer") else turn)

    def without(dropped: int) -> list[int]:
        return render([each for each, own in zip(messages, turns, strict=True) if own is None or own >= dropped])

    dropped = bisect_left(range(turn), True, key=lambda number: len(without(number)) <= room)
    return without(dropped), dropped


def parse_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> Content | None:
    """Return the content of an answer's tokens, without its end token; None: it is empty, or a call is not closed."""
    special = tokenizer.special_ids
    kinds = {special[start]: (kind, special[end]) for kind, (start, end, _) in _PARTS.items() if start and end}
    parts: list[dict[str, str]] = []
    rest = list(ids)
    while rest:
        kind, end = kinds.get(rest[0], ("text", None))
        if end is None:
            stop = next((place for place, id_ in enumerate(rest) if id_ in kinds), len(rest))
            inside, rest = rest[:stop], rest[stop:]
        elif end in rest:
            stop = rest.index(end)
            inside, rest = rest[1:stop], rest[stop + 1 :]
        else:
            return None
        if any(id_ in special.values() for id_ in inside):
            return None
        parts.append({"type": kind, "text": tokenizer.decode(inside)})
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"] if parts[0]["text"].strip() else None
    return parts or None
