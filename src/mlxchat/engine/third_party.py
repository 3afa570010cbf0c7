"""Third-party models, loaded by mlx-lm: their chat template and tokenizer, mlx-lm's batches.

Only safetensors and JSON are read, neither pickles nor code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import byte_letters
from mlxchat.engine.batch import Event, Request, Row
from mlxchat.engine.generate import Engine, Scheduler
from mlxchat.engine.sample import Sampler, make_draws, most_likely, score_tokens
from mlxchat.errors import ConfigError, DataError
from mlxchat.ops.machine import DECODED_ROWS, KEPT_TOKENS, PREFILL_TOKENS, SCORED_TOKENS
from mlxchat.tasks.base import content_text, find_fault

MOST_CONTEXT_TOKENS = 8192  # limit for third-party models, since a row's memory grows with its length
_MOST_LOGITS = 1 << 27  # of a forward pass that scores; logits are computed for every position
# Tokens after which mlx-lm would end a row; the scheduler removes it before.
_UNLIMITED = 1 << 30


class ThirdPartyEngine(Engine):
    """An engine of any architecture that mlx-lm can batch, in one process."""

    is_ours = False

    def __init__(self, model: Any, tokenizer: ThirdPartyTokenizer, model_type: str, context_tokens: int) -> None:
        """`model` is mlx-lm's, `context_tokens` the maximum input length."""
        # Not `Engine.__init__`, which reads the sizes of our models.
        self.model, self.tokenizer = model, tokenizer
        self.dtype, self.team = None, None
        self.batch_tokens = min(SCORED_TOKENS, _MOST_LOGITS // tokenizer.vocab_size)
        self.model_type, self.context_tokens = model_type, context_tokens

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """See `ThirdPartyTokenizer.render`."""
        return list(self.tokenizer.render(messages))

    @classmethod
    def load(cls, folder: Path) -> ThirdPartyEngine:
        """Load a folder with config.json, model*.safetensors and a tokenizer's files, without executing its code."""
        tokenizer, context_tokens = load_tokenizer(folder)
        with _opening(folder) as (loading, config):
            return cls(loading.load_model(folder)[0], tokenizer, str(config.get("model_type")), context_tokens)

    def scheduler(self, **options: Any) -> Scheduler:
        """Return a scheduler without requests; `options` are `ThirdPartyGenerator`'s."""
        return Scheduler(ThirdPartyGenerator(self.model, **options), self.tokenizer)


@contextmanager
def _opening(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield mlx-lm's `utils` and a folder's config.json; any error becomes a DataError."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model; expected config.json, model*.safetensors and a tokenizer's files")
    try:
        from mlx_lm import utils
    except ImportError:
        raise ConfigError("third-party models need mlx-lm: pip install 'mlxchat[outside]'") from None
    try:
        yield utils, json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except Exception as error:  # a damaged folder may raise any error
        reason = shorten(str(error), 300, placeholder="…")
        raise DataError(f"{folder}: mlx-lm cannot open it ({type(error).__name__}: {reason})") from None


def load_tokenizer(folder: Path) -> tuple[ThirdPartyTokenizer, int]:
    """Return a folder's tokenizer and the model's maximum input length; the model is not loaded."""
    with _opening(folder) as (loading, config):
        safely, ends = {"trust_remote_code": False}, config.get("eos_token_id")
        tokenizer = ThirdPartyTokenizer(loading.load_tokenizer(folder, safely, eos_token_ids=ends))
        sizes = config.get("text_config", config)
        context_tokens = int(sizes.get("max_position_embeddings") or sizes.get("n_positions") or MOST_CONTEXT_TOKENS)
        return tokenizer, min(MOST_CONTEXT_TOKENS, context_tokens)


class ThirdPartyGenerator:
    """Continues rows by mlx-lm's `BatchGenerator`, with the methods of `batch.Generator`."""

    def __init__(self, model: Any, *, max_rows: int = DECODED_ROWS, kept_tokens: int = KEPT_TOKENS) -> None:
        """Start without rows; mlx-lm keeps the prefixes of some rows if `kept_tokens` is above 0."""
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.models.cache import LRUPromptCache

        self.model, self.num_reused = model, 0
        self._batch: Any = BatchGenerator(
            model, completion_batch_size=max_rows, prefill_batch_size=min(8, max_rows),
            prefill_step_size=PREFILL_TOKENS, stream=mx.default_stream(mx.default_device()),
        )  # fmt: skip
        self._kept = LRUPromptCache() if kept_tokens else None
        self._rows: dict[int, Row] = {}

    def insert(self, request: Request) -> Row:
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
            return request.restrict(logits.astype(mx.float32), 0, answer)

        (id,) = self._batch.insert(
            [missing], [_UNLIMITED], caches=None if cache is None else [cache], all_tokens=[seen],
            # The same function in all greedy rows is called once for the batch.
            samplers=[most_likely if request.sampling.temperature == 0 else draw],
            logits_processors=[[restrict]] if request.in_step else None,
        )  # fmt: skip
        self._rows[id] = Row(int(id), request, list(request.prompt), draws)
        return self._rows[id]

    def next(self) -> list[Event]:
        """See `Generator.next`."""
        events = []
        for response in self._batch.next()[1]:
            row = self._rows[response.uid]
            row.ids.append(response.token)
            events.append(Event(id=row.id, token=response.token, sampled=True))
            if (most := row.request.logprobs) is not None:
                scores = score_tokens(response.logprobs[None].astype(mx.float32), mx.array([response.token]), most)
                ((events[-1].logprob, events[-1].top_logprobs),) = scores.read()
        return events

    def remove(self, row: Row) -> None:
        """See `Generator.remove`."""
        del self._rows[row.id]
        cache, ids = self._batch.remove([row.id], return_prompt_caches=True)[row.id]
        if row.request.reuse and self._kept is not None and ids:
            self._kept.insert_cache(None, list(ids), cache)


class ThirdPartyTokenizer:
    """A tokenizer of the transformers library with our interface."""

    def __init__(self, wrapper: Any) -> None:
        """`wrapper` is mlx-lm's; raises DataError if there is no token to begin a text with."""
        self.inner = getattr(wrapper, "_tokenizer", wrapper)
        self.tokens = {int(index): str(token) for token, index in self.inner.get_vocab().items()}
        """Id → token, spelled as in tokenizer.json."""
        self.vocab_size = max(self.tokens) + 1
        names = self.inner.get_vocab()
        starts = (self.inner.bos_token_id, names.get("<|bos|>"), names.get("<|endoftext|>"), self.inner.eos_token_id)
        bos = next((token for token in starts if token is not None), None)
        if bos is None:
            raise DataError("the tokenizer has no token that begins or ends a text")
        self.bos = int(bos)
        self.ends = tuple(sorted(getattr(wrapper, "eos_token_ids", ()))) or (self.bos,)  # tokens that end an answer
        self.has_chat_template = bool(getattr(self.inner, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without added tokens."""
        text = text.encode(errors="replace").decode()  # the library refuses lone surrogates
        return list(self.inner.encode(text, add_special_tokens=False))

    def encode_documents(self, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.uint32]]]:
        """Return each document's ids, with the begin token in front."""
        return [np.array([self.bos, *self.encode(text)], dtype=np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; ids beyond the vocabulary, for which some models have logits, are skipped."""
        return str(self.inner.decode([each for each in ids if each < self.vocab_size]))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids without special tokens."""
        return b"".join(self._bytes.get(each, b"") for each in ids)

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the prompt of the assistant's next message by the folder's chat template.

        Raises DataError if the conversation is invalid, or the template refuses it (many refuse system prompts).
        """
        if fault := find_fault(messages, least=1):
            raise DataError(f"a conversation cannot be tokenized: {fault}")
        plain = [{"role": each["role"], "content": content_text(each["content"])} for each in messages]
        try:
            return self.encode(str(self.inner.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)))
        except Exception as error:  # a template may raise any error
            raise DataError(f"the model's chat template does not render this conversation ({error})") from None

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Special token → id."""
        added = self.inner.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special} | set(self.inner.all_special_tokens)
        return {token: index for index, token in self.tokens.items() if token in names}

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Id → bytes of every token that is not special, of byte-level BPE and of SentencePiece."""
        letters = {letter: byte for byte, letter in byte_letters().items()}
        is_bytewise = '"ByteLevel"' in self.inner.backend_tokenizer.to_str()
        added = self.inner.added_tokens_decoder

        def spell(index: int, token: str) -> bytes:
            if is_bytewise and index not in added and letters.keys() >= set(token):
                return bytes(letters[letter] for letter in token)
            if len(token) == 6 and token.startswith("<0x"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()

        special = set(self.special_ids.values())
        return {index: spell(index, token) for index, token in self.tokens.items() if index not in special}

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Number of bytes of each id, 0 for special tokens: (vocab_size,)."""
        return np.array([len(self._bytes.get(index, b"")) for index in range(self.vocab_size)], dtype=np.int32)

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that determines the encoding, in hexadecimal."""
        return hashlib.sha256(f"{self.bos}\n{self.inner.backend_tokenizer.to_str()}".encode()).hexdigest()


AnyTokenizer: TypeAlias = Tokenizer | ThirdPartyTokenizer
