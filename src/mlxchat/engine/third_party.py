"""Third-party models, loaded by mlx-lm: their chat template and tokenizer, mlx-lm's batches.

Only safetensors and JSON are read, neither pickles nor code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import byte_letters
from mlxchat.engine.batch import Request, Token, restricted, score_sequence
from mlxchat.engine.generate import Completion, complete_all, row_seeds
from mlxchat.engine.sample import Sampler, Scored, make_draws, score_tokens
from mlxchat.engine.scheduler import Scheduler
from mlxchat.errors import ConfigError, DataError, filter_logs
from mlxchat.ops.machine import DECODED_ROWS, KEPT_TOKENS, PREFILL_TOKENS
from mlxchat.tasks.answers import content_text
from mlxchat.tasks.base import find_fault

MOST_CONTEXT_TOKENS = 8192
"""Limit for third-party models, since a row's memory grows with its length."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_MOST_REASON_CHARS = 300
_HALF = re.compile("[\ud800-\udfff]")


class ThirdPartyEngine:
    """What `Engine` is for our models, with any architecture that mlx-lm can batch, in one process."""

    team = None

    def __init__(self, model: Any, tokenizer: ThirdPartyTokenizer, config: dict[str, Any], context_tokens: int) -> None:
        """`model` is mlx-lm's, `config` the contents of config.json, `context_tokens` the maximum input length."""
        self.model, self.tokenizer, self.context_tokens = model, tokenizer, context_tokens
        self.model_type = str(config.get("model_type"))
        self.render = tokenizer.render

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

    def scheduler(self, *, python: Any = None, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `ThirdPartyGenerator`'s, and there are no tools."""
        return Scheduler(ThirdPartyGenerator(self.model, **options), self.tokenizer)

    def complete(self, prompts: list[list[int]], *, seed: int | Sequence[int] = 0, **how: Any) -> list[Completion]:
        """Return one completion per prompt; see `Engine.complete`."""
        return complete_all(self.scheduler(), prompts, row_seeds(seed, len(prompts)), **how)


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
        reason = shorten(str(error), _MOST_REASON_CHARS, placeholder="…")  # parameters begin on the second line
        raise DataError(f"{folder}: mlx-lm cannot open it ({type(error).__name__}: {reason})") from None


def load_tokenizer(folder: Path) -> tuple[ThirdPartyTokenizer, int]:
    """Return a folder's tokenizer and the model's maximum input length; the model is not loaded. Errors as `load`'s."""
    with _opening(folder) as (loading, config):
        return _load_tokenizer(loading, folder, config), _context_of(config)


def _load_tokenizer(loading: Any, folder: Path, config: dict[str, Any]) -> ThirdPartyTokenizer:
    wrapper = loading.load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    tokenizer = ThirdPartyTokenizer(wrapper)
    tokenizer.encode("a")  # fails now for faults in some settings
    return tokenizer


def _context_of(config: dict[str, Any]) -> int:
    """Return a model's maximum input length by its config.json, at most MOST_CONTEXT_TOKENS."""
    sources = (config, config.get("text_config", {}))
    tokens = next((int(each[key]) for each in sources for key in _CONTEXT_KEYS if each.get(key)), MOST_CONTEXT_TOKENS)
    if tokens < 1:
        raise ValueError(f"the context has {tokens} tokens, expected at least 1")
    return min(MOST_CONTEXT_TOKENS, tokens)


def _nanochat_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return options of mlx-lm's `load_model` for the names of transformers and `mlxchat export --to hf`."""
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


class ThirdPartyGenerator:
    """Continues rows by mlx-lm's `BatchGenerator`, with the methods of `batch.Generator` except those of tools."""

    def __init__(
        self, model: Any, *, max_rows: int = DECODED_ROWS, prefill_tokens: int = PREFILL_TOKENS,
        kept_tokens: int = KEPT_TOKENS,
    ) -> None:  # fmt: skip
        """Start without rows; mlx-lm keeps the prefixes of some rows if `kept_tokens` is above 0."""
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.models.cache import LRUPromptCache

        self.model, self.num_reused = model, 0
        self._batch: Any = BatchGenerator(
            model, completion_batch_size=max_rows, prefill_batch_size=min(8, max_rows),
            prefill_step_size=prefill_tokens, stream=mx.default_stream(mx.default_device()),
        )  # fmt: skip
        self._kept = LRUPromptCache() if kept_tokens else None
        self._requests: dict[int, Request] = {}
        self._ended: dict[int, tuple[list[Any], list[int]]] = {}

    def insert(self, request: Request) -> int:
        """See `Generator.insert`."""
        cache, missing = None, request.prompt
        if request.reuse and self._kept is not None:
            cache, missing = self._kept.fetch_nearest_cache(None, request.prompt)
        if not missing:  # the last token is always forwarded
            cache, missing = None, request.prompt
        seen = request.prompt[: len(request.prompt) - len(missing)]
        self.num_reused += len(seen)
        sampler, draws = Sampler([request.sampling]), make_draws(request.sampling.seed)

        def draw(logits: mx.array) -> mx.array:
            return sampler(logits, [draws.random()])

        def restrict(context: mx.array, logits: mx.array) -> mx.array:
            answer = np.asarray(context)[len(request.prompt) :].tolist()
            return restricted(logits.astype(mx.float32), 0, request, answer)

        (id,) = self._batch.insert(
            [missing], [request.max_new_tokens], caches=None if cache is None else [cache], all_tokens=[seen],
            samplers=[greedy if request.sampling.temperature == 0 else draw],
            logits_processors=[[restrict]] if request.in_step else None,
        )  # fmt: skip
        self._requests[id] = request
        return int(id)

    def next(self) -> list[Token]:
        """See `Generator.next`."""
        found = []
        for response in self._batch.next()[1]:
            scored = None
            if (most := self._requests[response.uid].logprobs) is not None:
                scores = response.logprobs[None].astype(mx.float32)
                (scored,) = score_tokens(scores, mx.array([response.token]), most).read()
            if response.finish_reason is not None:
                self._ended[response.uid] = response.prompt_cache, response.all_tokens
            found.append(Token(response.uid, response.token, sampled=True, scored=scored))
        return found

    def remove(self, id: int) -> None:
        """See `Generator.remove`."""
        held = self._ended.pop(id, None) or self._batch.remove([id], return_prompt_caches=True)[id]
        if self._requests.pop(id).reuse and self._kept is not None and held[1]:
            self._kept.insert_cache(None, list(held[1]), held[0])

    def score(self, ids: Sequence[int], most: int) -> list[Scored]:
        """See `Generator.score`."""
        logits = self.model(mx.array([list(ids[:-1])]))[0].astype(mx.float32)
        return score_sequence(lambda part: logits[part], ids, most)


def greedy(logits: mx.array) -> mx.array:
    """Return the most likely tokens (B,); one function for all rows, so that mlx-lm calls it once for the batch."""
    return mx.argmax(logits, axis=-1)


class ThirdPartyTokenizer:
    """A tokenizer of the transformers library with our interface."""

    def __init__(self, wrapper: Any) -> None:
        """`wrapper` is mlx-lm's; raises DataError if there is no token to begin a text with."""
        self.wrapper = wrapper
        self._inner = inner = getattr(wrapper, "_tokenizer", wrapper)
        names = inner.get_vocab()
        candidates = (inner.bos_token_id, names.get("<|bos|>"), names.get("<|endoftext|>"), inner.eos_token_id)
        bos = next((candidate for candidate in candidates if candidate is not None), None)
        if bos is None:
            raise DataError("the tokenizer has no token that begins or ends a text")
        self.bos = int(bos)

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
        return any(not self.decode([first]).startswith(" ") for first in islice(words, 1))

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Id → bytes of every token that is not special."""
        letters = {letter: byte for byte, letter in byte_letters().items()}
        bytewise = '"ByteLevel"' in self._inner.backend_tokenizer.to_str()
        added = self._inner.added_tokens_decoder

        def spell(token: str, index: int) -> bytes:
            if bytewise and index not in added and letters.keys() >= set(token):
                return bytes(letters[letter] for letter in token)
            if len(token) == 6 and token.startswith("<0x"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()

        names, special = self._inner.get_vocab().items(), set(self.special_ids.values())
        return {int(index): spell(token, index) for token, index in names if index not in special}

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Number of bytes of each id, 0 for special tokens: (vocab_size,)."""
        return np.array([len(self._bytes.get(index, b"")) for index in range(self.vocab_size)], dtype=np.int32)

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that determines the encoding, in hexadecimal."""
        return hashlib.sha256(f"{self.bos}\n{self._inner.backend_tokenizer.to_str()}".encode()).hexdigest()


AnyTokenizer: TypeAlias = Tokenizer | ThirdPartyTokenizer
