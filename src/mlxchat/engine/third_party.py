"""Third-party models, loaded by mlx-lm, as a `ChatBackend`: their chat template and tokenizer, our scheduler.

Only safetensors and JSON are read, neither pickles nor code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.vocabulary import byte_letters
from mlxchat.engine.generate import Completion
from mlxchat.engine.scheduler import Scheduler
from mlxchat.errors import ConfigError, DataError, filter_logs
from mlxchat.tasks.answers import content_text
from mlxchat.tasks.base import find_fault

MOST_CONTEXT_TOKENS = 8192
"""Limit for third-party models, since a row's memory grows with its length."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_MOST_REASON_CHARS = 300
_HALF = re.compile("[\ud800-\udfff]")
# Tokens whose logits are in memory at a time.
_SCORED_TOKENS = 128


class ThirdPartyEngine:
    """A `ChatBackend` of any architecture. Rows are computed one by one, so answers do not depend on each other."""

    team = None
    """No other ranks."""

    def __init__(self, model: Any, tokenizer: ThirdPartyTokenizer, config: dict[str, Any], context_tokens: int) -> None:
        """`model` is mlx-lm's, `config` the contents of config.json, `context_tokens` the maximum input length."""
        self.model, self.tokenizer, self.context_tokens = model, tokenizer, context_tokens
        self.model_type = str(config.get("model_type"))

    @classmethod
    def load(
        cls, folder: Path, *, context_tokens: int | None = None, most_context_tokens: int = MOST_CONTEXT_TOKENS
    ) -> ThirdPartyEngine:
        """Load a folder with config.json, model*.safetensors and a tokenizer's files.

        `context_tokens` is the maximum input length; None: that of config.json, at most `most_context_tokens`.

        Raises:
            ConfigError: mlx-lm is not installed.
            DataError: the folder does not exist, or mlx-lm cannot load it without executing its code.
        """
        with _opening(folder) as (loading, config):
            renamed = _nanochat_options(config) if config.get("model_type") == "nanochat" else {}
            model = loading.load_model(folder, **renamed)[0]
            context = context_tokens or min(_context_of(config), most_context_tokens)
            return cls(model, _load_tokenizer(loading, folder, config), config, context)

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """See `ThirdPartyTokenizer.render`."""
        return self.tokenizer.render(messages)

    def scheduler(self, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `Scheduler`'s."""
        return Scheduler(ThirdPartySlots(self.model), self.tokenizer, **options)

    def complete(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:  # fmt: skip
        """Return one greedy completion per prompt, batched by mlx-lm.

        Raises:
            ConfigError: `temperature` is not 0.
        """
        if temperature:
            raise ConfigError(f"temperature is {temperature}; whole batches of third-party models are greedy")
        from mlx_lm.generate import batch_generate

        found = batch_generate(
            self.model, self.tokenizer.wrapper, prompts, max_tokens=max_new_tokens, return_token_ids=True
        )
        assert found.token_ids is not None
        return [
            Completion(ids, [1] * len(ids))
            if len(ids) == max_new_tokens
            else Completion([*ids, self.tokenizer.ends[0]], [1] * (len(ids) + 1), finished=True)
            for ids in found.token_ids
        ]


@contextmanager
def _opening(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield mlx-lm's `utils` and a folder's config.json; any error becomes a DataError."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model; expected config.json, model*.safetensors and a tokenizer's files")
    filter_logs()
    try:
        from mlx_lm import utils
    except ImportError:
        raise ConfigError("third-party models need mlx-lm: pip install 'mlxchat[outside]'") from None
    try:
        yield utils, json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except MemoryError:
        raise
    except Exception as error:  # a hostile or damaged folder may raise any error
        reason = " ".join(str(error).split())  # a list of parameters begins on the second line
        shown = reason if len(reason) <= _MOST_REASON_CHARS else reason[:_MOST_REASON_CHARS] + "…"
        raise DataError(f"{folder}: mlx-lm cannot open it ({type(error).__name__}: {shown})") from None


def load_tokenizer(folder: Path) -> tuple[ThirdPartyTokenizer, int]:
    """Return the tokenizer of a folder and the model's maximum input length; the model is not loaded.

    Raises:
        ConfigError: mlx-lm is not installed.
        DataError: the folder does not exist, or mlx-lm cannot open it.
    """
    with _opening(folder) as (loading, config):
        return _load_tokenizer(loading, folder, config), _context_of(config)


def _load_tokenizer(loading: Any, folder: Path, config: dict[str, Any]) -> ThirdPartyTokenizer:
    wrapper = loading.load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    tokenizer = ThirdPartyTokenizer(wrapper)
    tokenizer.encode("a")  # fails now for faults in some settings
    return tokenizer


def _context_of(config: dict[str, Any]) -> int:
    """Return a model's maximum input length by its config.json, at most 8192 tokens.

    Raises:
        ValueError: it is below 1.
    """
    sources = (config, config.get("text_config", {}))
    found = [(key, int(source[key])) for source in sources for key in _CONTEXT_KEYS if source.get(key)]
    for key, tokens in found[:1]:
        if tokens < 1:
            raise ValueError(f"{key} is {tokens}, expected at least 1")
        return min(MOST_CONTEXT_TOKENS, tokens)
    return MOST_CONTEXT_TOKENS


def _nanochat_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return options of mlx-lm's `load_model` for a nanochat model with `NanoChatForCausalLM`'s names.

    mlx-lm supports only nanochat's names; folders of transformers and of `mlxchat export --to hf` have the others.
    """
    from mlx_lm.models import nanochat

    from mlxchat.interop.names import ours_from_hf

    class Renamed(nanochat.Model):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {ours_from_hf(name) or name: value for name, value in weights.items()}

    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    return {
        "get_model_classes": lambda config: (Renamed, nanochat.ModelArgs),
        "model_config": {"rope_theta": theta} if theta and "rope_theta" not in config else None,
    }


class _Past:
    """mlx-lm's cache of a row's prefix."""

    def __init__(self, cache: list[Any], tokens: int) -> None:
        self.cache, self.tokens = cache, tokens

    def begun(self, tokens: int) -> _Past | None:
        """Return the first `tokens`; None: this cache cannot be trimmed."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        cache = copy.deepcopy(self.cache)  # arrays are shared until one of the two is written
        if tokens < self.tokens:
            if not can_trim_prompt_cache(cache):
                return None
            trim_prompt_cache(cache, self.tokens - tokens)
        return _Past(cache, tokens)


class ThirdPartySlots:
    """The scheduler's `Forward`, with a separate cache for each row."""

    def __init__(self, model: Any) -> None:
        """`model` is mlx-lm's."""
        self.model = model
        self._rows: list[_Past | None] = []

    def read(self, ids: list[int], past: _Past | None, last: int | None) -> _Past:
        """Return the past of a row of `past` followed by `ids`."""
        row = self._copied(past)
        self.model(mx.array([ids]), cache=row.cache)
        mx.eval([each.state for each in row.cache])
        row.tokens += len(ids)
        return row

    def score(self, ids: list[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the logits (V,) after each of `ids`, at the beginning of a row."""
        row = self._copied(None)
        for start in range(0, len(ids), _SCORED_TOKENS):
            logits = self.model(mx.array([ids[start : start + _SCORED_TOKENS]]), cache=row.cache)[0]
            yield from np.asarray(logits.astype(mx.float32))

    def reserve(self, rows: int, tokens: int) -> None:
        """Grow to at least this many rows."""
        self._rows += [None] * (rows - len(self._rows))

    def keep(self, kept: list[int], tokens: int) -> None:
        """Keep only these rows, renumbered from 0."""
        self._rows = [self._rows[place] for place in kept]

    def clear(self) -> None:
        """Remove all rows."""
        self._rows = []

    def fill(self, row: int, past: _Past | None) -> None:
        """Set the past of a row; None: empty."""
        self._rows[row] = self._copied(past)

    def past_of(self, row: int, tokens: int) -> _Past | None:
        """Return the past of a row's first tokens."""
        held = self._rows[row]
        return held and held.begun(tokens)

    def step(self, ids: list[int], previous: list[int], positions: list[int]) -> np.ndarray[Any, Any]:
        """Return logits (B, V) after one more token of each row; rows whose past has another length are free."""
        rows = [row if row and row.tokens == at else None for row, at in zip(self._rows, positions, strict=False)]
        self._rows = [*rows, *self._rows[len(rows) :]]
        used = [place for place, row in enumerate(rows) if row is not None]
        found = []
        for place in used:
            row = rows[place]
            assert row is not None
            found.append(self.model(mx.array([[ids[place]]]), cache=row.cache)[0, -1].astype(mx.float32))
            row.tokens += 1
        logits = np.asarray(mx.stack(found))
        every = np.zeros((len(ids), logits.shape[1]), dtype=np.float32)
        every[used] = logits
        return every

    def _copied(self, past: _Past | None) -> _Past:
        from mlx_lm.models.cache import make_prompt_cache

        copied = past.begun(past.tokens) if past else _Past(make_prompt_cache(self.model), 0)
        assert copied is not None
        return copied


class ThirdPartyTokenizer:
    """A tokenizer of the transformers library with our interface."""

    def __init__(self, wrapper: Any) -> None:
        """`wrapper` is mlx-lm's.

        Raises:
            DataError: it has no token to begin a text with.
        """
        self.wrapper = wrapper
        self._inner = getattr(wrapper, "_tokenizer", wrapper)
        names = self._inner.get_vocab()
        candidates = [
            self._inner.bos_token_id, names.get("<|bos|>"), names.get("<|endoftext|>"), self._inner.eos_token_id,
        ]  # fmt: skip
        found = [candidate for candidate in candidates if candidate is not None]
        if not found:
            raise DataError("the tokenizer has no token that begins or ends a text")
        self.bos = int(found[0])

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return int(max(self._inner.get_vocab().values())) + 1

    def vocabulary(self) -> dict[int, str]:
        """Return id → token, spelled as in tokenizer.json."""
        return {int(index): str(token) for token, index in self._inner.get_vocab().items()}

    @property
    def has_chat_template(self) -> bool:
        """Whether it has a chat template."""
        return bool(getattr(self._inner, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without added tokens."""
        text = _HALF.sub("\ufffd", text)  # the library refuses lone surrogates
        return list(self._inner.encode(text, add_special_tokens=False))

    def encode_documents(self, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.uint32]]]:
        """Return each document's ids, with the begin token in front."""
        return [np.array([self.bos, *self.encode(text)], dtype=np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; ids beyond the vocabulary, for which some models have logits, are skipped."""
        return str(self._inner.decode([each for each in ids if each < self.vocab_size]))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids without special tokens."""
        return b"".join(self._bytes.get(each, b"") for each in ids)

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the prompt of the assistant's next message by the folder's chat template.

        Raises:
            DataError: the conversation is invalid, or the template fails or refuses it (many refuse system prompts).
        """
        if fault := find_fault(messages, least=1):
            raise DataError(f"a conversation cannot be tokenized: {fault}")
        plain = [{"role": each["role"], "content": content_text(each["content"])} for each in messages]
        try:
            text = self._inner.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise any error, with any text
            reason = f"{type(error).__name__}: {error}"[:500]
            raise DataError(f"the model's chat template does not render this conversation ({reason})") from None
        if not (ids := self.encode(str(text))):
            raise DataError("the model's chat template renders this conversation as empty text")
        return ids

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Special token → id."""
        added = self._inner.added_tokens_decoder.items()
        names = {str(token) for index, token in added if token.special} | set(self._inner.all_special_tokens)
        return {name: int(index) for name, index in self._inner.get_vocab().items() if name in names}

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(sorted(self.wrapper.eos_token_ids)) or (self.bos,)

    @cached_property
    def skips_blank(self) -> bool:
        """Whether decoding drops the blank before the first word, as with SentencePiece."""
        words = (index for index, data in self._bytes.items() if data[:1] == b" " and data.strip())
        first = next(words, None)
        return first is not None and not self.decode([first]).startswith(" ")

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Id → bytes of every token that is not special."""
        letters = {letter: byte for byte, letter in byte_letters().items()}
        bytewise = '"ByteLevel"' in self._inner.backend_tokenizer.to_str()
        special, added = set(self.special_ids.values()), self._inner.added_tokens_decoder
        found = {}
        for token, index in self._inner.get_vocab().items():
            if index in special:
                continue
            if bytewise and index not in added and letters.keys() >= set(token):
                found[int(index)] = bytes(letters[letter] for letter in token)
            elif len(token) == 6 and token.startswith("<0x"):
                found[int(index)] = bytes([int(token[3:5], 16)])
            else:
                found[int(index)] = token.replace("▁", " ").encode()
        return found

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Number of bytes of each id, 0 for special tokens: (vocab_size,)."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for index, data in self._bytes.items():
            lengths[index] = len(data)
        return lengths

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that determines the encoding, in hexadecimal."""
        return hashlib.sha256(f"{self.bos}\n{self._inner.backend_tokenizer.to_str()}".encode()).hexdigest()
