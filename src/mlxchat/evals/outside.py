"""Models of other makes, in a folder that mlx-lm opens, as a `LanguageModel` with its tokenizer.

Safetensors and JSON only: neither pickles nor code of the folder's are loaded, and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxchat.errors import ConfigError, DataError, filter_logs
from mlxchat.evals.branching import Row

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int32]]
# Logits and cached tokens that are held at a time.
_MOST_LOGITS = 1 << 26
_MOST_CACHED_TOKENS = 8192
# nanochat's context: what ours are compared in.
_MOST_CONTEXT_TOKENS = 2048
_MOST_REASON_CHARS = 300
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


def load_outside(folder: Path, *, context_tokens: int | None = None) -> tuple[OutsideModel, OutsideTokenizer]:
    """Return the model and the tokenizer of a folder.

    Args:
        folder: what mlx-lm opens.
        context_tokens: longest input; None: what config.json says, up to 2048.

    Raises:
        ConfigError: mlx-lm is not installed.
        DataError: there is no such folder, or mlx-lm cannot open it without running code of its.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model folder; expected config.json, model*.safetensors and a tokenizer's files")
    filter_logs()
    try:
        from mlx_lm import utils
    except ImportError:
        raise ConfigError("outside models need mlx-lm: pip install 'mlxchat[outside]'") from None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        renamed = _nanochat_options(config) if config.get("model_type") == "nanochat" else {}
        loading: Any = utils  # partly typed
        model = loading.load_model(folder, **renamed)[0]
        wrapper = loading.load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
        tokenizer = OutsideTokenizer(wrapper)
        tokenizer.encode("a")  # some values of its config are used only here
        return OutsideModel(model, config, context_tokens), tokenizer
    except MemoryError:
        raise
    except Exception as error:  # whatever a folder of unknown make leads to
        reason = " ".join(str(error).split())  # a list of parameters begins on the second line
        shown = reason if len(reason) <= _MOST_REASON_CHARS else reason[:_MOST_REASON_CHARS] + "…"
        raise DataError(f"{folder}: mlx-lm cannot open it ({type(error).__name__}: {shown})") from None


def _nanochat_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return options of mlx-lm's `load_model` for a nanochat model, which knows nanochat's names of parameters only.

    Folders of transformers, also those of `mlxchat export --to hf`, have `NanoChatForCausalLM`'s names.
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


class OutsideModel:
    """A model that mlx-lm made. What rows share at their beginning is computed once, by its own cache."""

    def __init__(self, model: Any, config: dict[str, Any], context_tokens: int | None = None) -> None:
        """Take the model, what its config.json says, and the longest input if it is another."""
        self.model, self.model_type = model, str(config.get("model_type"))
        sources = (config, config.get("text_config", {}))
        said = [int(source[key]) for source in sources for key in _CONTEXT_KEYS if source.get(key)]
        self._context = context_tokens or min([_MOST_CONTEXT_TOKENS, *said[:1]])

    @property
    def context_tokens(self) -> int:
        """Longest input."""
        return self._context

    @property
    def extends(self) -> bool:
        """Never: third-party models keep their own limits."""
        return False

    def __call__(self, ids: mx.array) -> mx.array:
        """Return logits (B, T, V) in float32 of ids (B, T)."""
        logits: mx.array = self.model(ids)
        return logits.astype(mx.float32)

    def losses(self, rows: Sequence[Row]) -> list[list[Floats]]:
        """See `LanguageModel.losses`."""
        return self._of_targets(rows, _losses)

    def predictions(self, rows: Sequence[Row]) -> list[list[Ints]]:
        """See `LanguageModel.predictions`."""
        return self._of_targets(rows, lambda logits, targets: logits.argmax(-1).astype(mx.int32))

    def token_losses(self, ids: Ints, targets: Ints) -> Floats:
        """See `LanguageModel.token_losses`."""
        losses = _losses(self(mx.array(ids)), mx.array(np.maximum(targets, 0)))
        return np.asarray(mx.where(mx.array(targets) >= 0, losses, 0.0))

    def next_logits(self, prompts: Sequence[list[int]]) -> Floats:
        """See `LanguageModel.next_logits`."""
        return np.concatenate([np.asarray(part) for _, part in self._wanted(prompts, [len(p) for p in prompts])])

    def _of_targets(self, rows: Sequence[Row], judge: Any) -> list[list[Any]]:
        sequences = [row.trunk + branch for row in rows for branch in row.branches]
        starts = [start for row in rows for start in row.starts]
        targets = [each for row in rows for each in row.targets]
        found: list[Any] = []
        for part, logits in self._wanted(sequences, starts, [len(each) for each in targets]):
            wanted = [token for each in targets[part] for token in each]
            values = np.asarray(judge(logits, mx.array(np.asarray(wanted, np.int32))))
            end = 0
            for each in targets[part]:
                found.append(values[end : (end := end + len(each))])
        flat = iter(found)
        return [[next(flat) for _ in row.branches] for row in rows]

    def _wanted(
        self, sequences: Sequence[list[int]], starts: Sequence[int], counts: Sequence[int] | None = None
    ) -> Iterator[tuple[slice, mx.array]]:
        """Yield parts of the sequences and the logits (N, V) before positions start … start + count − 1 of each.

        Every sequence's first tokens up to the earliest start are computed with a cache and without logits, equal ones
        once; what follows, filled up at the right, with logits.
        """
        counts = counts if counts is not None else [1] * len(sequences)
        border = max(0, min(start for start in starts) - 1)
        cache, places = self._beginnings(sequences, border)
        for part in self._parts(sequences, border):
            rest = [sequence[border:] for sequence in sequences[part]]
            longest = max(map(len, rest))
            ids = mx.array([tokens + [tokens[-1]] * (longest - len(tokens)) for tokens in rest])
            past = None if cache is None else _taken(cache, mx.array(places[part]))
            logits = self.model(ids, cache=past)
            row = np.repeat(np.arange(len(rest)), counts[part])
            column = [np.arange(start - 1 - border, start - 1 - border + count)
                      for start, count in zip(starts[part], counts[part], strict=True)]  # fmt: skip
            chosen = logits[mx.array(row), mx.array(np.concatenate(column))].astype(mx.float32)
            mx.eval(chosen)
            yield part, chosen

    def _beginnings(self, sequences: Sequence[list[int]], border: int) -> tuple[list[Any] | None, list[int]]:
        """Return the cache after the first `border` tokens, and in which of its rows each sequence's are."""
        if not border:
            return None, [0] * len(sequences)
        from mlx_lm.models.cache import make_prompt_cache

        known: dict[tuple[int, ...], int] = {}
        places = [known.setdefault(tuple(sequence[:border]), len(known)) for sequence in sequences]
        cache: list[Any] = make_prompt_cache(self.model)
        self.model(mx.array([list(tokens) for tokens in known]), cache=cache)
        # The logits are never asked for, so the head is not computed.
        mx.eval([each.state for each in cache])
        return cache, places

    def _parts(self, sequences: Sequence[list[int]], border: int) -> Iterator[slice]:
        start = 0
        while start < len(sequences):
            longest, stop = len(sequences[start]), start
            while stop < len(sequences):
                longest = max(longest, len(sequences[stop]))
                count = stop + 1 - start
                logits = count * (longest - border) * self._vocab_size
                if count > 1 and (count * longest > _MOST_CACHED_TOKENS or logits > _MOST_LOGITS):
                    break
                stop += 1
            yield slice(start, stop)
            start = stop

    @cached_property
    def _vocab_size(self) -> int:
        return int(self.model(mx.array([[0]])).shape[-1])


class OutsideTokenizer:
    """A tokenizer of the transformers library, with what evaluations ask of one."""

    def __init__(self, wrapper: Any) -> None:
        """Take mlx-lm's wrapper.

        Raises:
            DataError: it has nothing to begin a text with.
        """
        self.wrapper = wrapper
        self._inner = getattr(wrapper, "_tokenizer", wrapper)
        names = self._inner.get_vocab()
        candidates = [
            self._inner.bos_token_id, names.get("<|bos|>"), names.get("<|endoftext|>"), self._inner.eos_token_id,
        ]  # fmt: skip
        found = [candidate for candidate in candidates if candidate is not None]
        if not found:
            raise DataError("the tokenizer has no token that begins a text, nor one that ends it")
        self.bos = int(found[0])

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return int(max(self._inner.get_vocab().values())) + 1

    def vocabulary(self) -> dict[int, str]:
        """Return id → token, as a tokenizer.json spells it."""
        return {int(index): str(token) for token, index in self._inner.get_vocab().items()}

    @property
    def has_chat_template(self) -> bool:
        """Whether it says how conversations are written."""
        return bool(getattr(self._inner, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added."""
        return list(self._inner.encode(text, add_special_tokens=False))

    def encode_documents(self, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.uint32]]]:
        """Return each document's ids, with the beginning token in front."""
        return [np.array([self.bos, *self.encode(text)], dtype=np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; those beyond the vocabulary, for which some models have logits, stand for nothing."""
        return str(self._inner.decode([each for each in ids if each < self.vocab_size]))

    def render_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of a conversation up to where the assistant answers, by the folder's own template.

        Raises:
            DataError: the template refuses the conversation (many refuse a system prompt) or cannot be rendered.
        """
        try:
            text = self._inner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise any error, with any text
            said = f"{type(error).__name__}: {error}"[:500]
            raise DataError(f"the model's chat template does not render this conversation ({said})") from None
        return self.encode(str(text))

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Raw bytes of each id, 0 for special tokens: (vocab_size,)."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        special = set(self._inner.all_special_ids) | {
            index for index, token in self._inner.added_tokens_decoder.items() if token.special
        }
        bytewise = '"ByteLevel"' in self._inner.backend_tokenizer.to_str()
        for token, index in self._inner.get_vocab().items():
            if index in special:
                continue
            if bytewise:
                lengths[index] = len(token)  # one character stands for each byte
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("▁", " ").encode())
        return lengths

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that decides how a text is encoded, in hex."""
        return hashlib.sha256(f"{self.bos}\n{self._inner.backend_tokenizer.to_str()}".encode()).hexdigest()


def _losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the cross-entropy in nats of targets (…,) under logits (…, V)."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _taken(cache: Sequence[Any], rows: mx.array) -> list[Any]:
    """Return a cache like this one with these of its rows; it can be written into without changing this one."""
    return [
        type(each).from_state(tree_map(lambda leaf: leaf[rows] if isinstance(leaf, mx.array) else leaf, each.state))
        for each in cache
    ]
