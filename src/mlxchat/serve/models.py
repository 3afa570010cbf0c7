"""The models of a server: names, provenance, metadata from their files, and loading."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxchat.config.wording import first_of
from mlxchat.data.tokenizer import Tokenizer, render_for_completion
from mlxchat.engine.generate import Engine, Scheduler
from mlxchat.engine.sample import JsonGrammars
from mlxchat.engine.third_party import ThirdPartyEngine, ThirdPartyTokenizer, load_tokenizer
from mlxchat.errors import ConfigError, DataError, StoreError, suggest
from mlxchat.interop.source import PREFIX
from mlxchat.model.checkpoint import load_for_inference
from mlxchat.model.lora import packed_copy
from mlxchat.planning.inputs import sizes_of_folder
from mlxchat.planning.memory import Decoding, find_device
from mlxchat.report.collect import num_parameters, text
from mlxchat.serve.security import Fault, Limits
from mlxchat.store.catalog import Summary, check_model, read_catalog
from mlxchat.store.files import Records
from mlxchat.store.fingerprint import canonical_json
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import find
from mlxchat.store.store import Store

_log = logging.getLogger("mlxchat.serve")
_NAME = re.compile(r"[\w.:@+-]+(/[\w.:@+-]+)*")
_MOST_NAME_CHARS, _SHOWN_CHARS = 300, 80
_MOST_PROMPTS, _MOST_PROMPT_CHARS = 4, 200
_num_parameters = lru_cache(maxsize=10_000)(num_parameters)


@dataclass(frozen=True)
class Model:
    """A checkpoint of the store, or a third-party model, without its weights."""

    name: str
    folder: Path
    tokenizer: Tokenizer | ThirdPartyTokenizer
    context_tokens: int
    converses: bool
    """False for a base model and for a third-party model without chat template, which only continue text."""
    digest: str = ""
    """Digest of its contents."""

    @property
    def third_party(self) -> bool:
        """Whether mlx-lm runs it."""
        return isinstance(self.tokenizer, ThirdPartyTokenizer)

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the prompt ids for the assistant's next message; DataError if a third-party template refuses it."""
        if isinstance(self.tokenizer, ThirdPartyTokenizer):
            return self.tokenizer.render(messages)
        return render_for_completion(self.tokenizer, {"messages": messages})

    @cached_property
    def grammars(self) -> JsonGrammars:
        """JSON constraints for its vocabulary; takes 1 s to build for 65,536 tokens."""
        return JsonGrammars(self.tokenizer)


class Models:
    """All models of a server: every checkpoint of the outputs folder, third-party models, and a default model."""

    def __init__(
        self, store: Store, default: Path, settings: Mapping[str, Any] | None = None, *,
        third_party: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        """Offer the models of a store.

        `default` is in the store or among `third_party` (name → folder of models that mlx-lm runs), `settings` are the
        server's that change answers.
        """
        self.store, self.default, self._settings = store, default, dict(settings or {})
        self._third_party = dict(third_party or {})
        self._names = {folder: name for name, folder in self._third_party.items()}

    def find(self, name: str | None) -> Model:
        """Return a model by any name that `mlxchat show` accepts; the default model for None or "default".

        Fault: no model has that name, or it cannot be read.
        """
        place = self._place(name)
        try:
            return self._read(place)
        except DataError as error:
            # Clients must not see this machine's paths.
            raise Fault(str(error).replace(f"{place.parent}/", ""), status=500) from None

    def entries(self) -> list[dict[str, Any]]:
        """Return OpenAI's entry of every model, the default first, with provenance in the extra field `mlxchat`."""
        found = [summary for summary in read_catalog(self.store) if "damaged" not in summary]
        scored = (summary for summary in found if summary.get("kind") == "scores")
        # Id of a checkpoint → its latest evaluation.
        judges = {made["rid"]: each for each in scored if (made := (each.get("inputs") or {}).get("checkpoint"))}
        entries = [
            self._own_entry(summary, judges.get(summary["rid"], {}))
            for summary in reversed(found)
            if summary.get("kind") == "checkpoint"
        ]
        entries += [self._third_party_entry(self._read(folder)) for folder in self._third_party.values()]
        return sorted(entries, key=lambda entry: entry["id"] != self._names.get(self.default, self.default.name))

    def fingerprint(self, digest: str) -> str:
        """Return the `system_fingerprint` of answers, a hash of the artifact's contents and the server's settings."""
        return hashlib.sha256(canonical_json({"digest": digest, **self._settings}).encode()).hexdigest()[:16]

    def entry(self, name: str) -> dict[str, Any]:
        """Return OpenAI's entry of one model, with the configuration of its training; Fault if it does not exist."""
        place = self._place(name)
        found = next(entry for entry in self.entries() if entry["id"] == self._names.get(place, place.name))
        if place in self._names:
            # Some config.json contain Infinity, which is not JSON.
            config = json.loads((place / "config.json").read_text(encoding="utf-8"), parse_constant=str)
            found["mlxchat"]["config"] = config
        else:
            manifest = read_manifest(place)
            found["mlxchat"] |= {key: manifest.get(key) for key in ("config", "git", "seed")}
        return found

    def _read(self, place: Path) -> Model:
        name = self._names.get(place)
        return read_model(place) if name is None else read_third_party(name, place)

    def _place(self, name: str | None) -> Path:
        """Return a model's folder; the default model's for None or "default"."""
        if name in (None, "", "default"):
            return self.default
        name = str(name)
        if (folder := self._third_party.get(name.removeprefix(PREFIX))) is not None:
            return folder
        # Names that are paths lead to no folder outside of the outputs.
        if len(name) <= _MOST_NAME_CHARS and _NAME.fullmatch(name) and ".." not in name.split("/"):
            with suppress(StoreError):  # its message lists artifacts of every kind, and this machine's paths
                place = find(self.store, name).place
                if read_manifest(place)["kind"] == "checkpoint":
                    return place
        entries, shown = self.entries(), name[:_SHOWN_CHARS]
        ids = [entry["id"] for entry in entries]
        hint = suggest(shown, [*ids, *(entry["mlxchat"]["step"] for entry in entries)])
        raise Fault(
            f"The model {shown!r} does not exist. Models: {first_of(ids, 8)}.{hint}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip

    def _own_entry(self, summary: Summary, judge: Summary) -> dict[str, Any]:
        """Return the entry of a checkpoint; `judge` is the summary of its latest evaluation, if any."""
        name, stage, folders = summary["folder"], summary["stage"], self.store.outputs / "store"
        asked = summary if stage == "pretrain" else judge or summary
        inputs = {role: made.get("artifact") for role, made in (summary.get("inputs") or {}).items() if made}
        own = {
            "digest": summary["tree"], "fingerprint": self.fingerprint(summary["tree"]), "step": summary["step"],
            "stage": stage, "label": name.removeprefix(f"{stage}-").rpartition("-")[0], "run": summary.get("run"),
            "parameters": _num_parameters(folders / name), "converses": stage != "pretrain", "inputs": inputs,
            "metrics": _numbers(summary["metrics"]), "scores": _numbers(judge.get("metrics", {})),
            "prompts": _prompts(folders / asked["folder"] / "samples.jsonl"),
        }  # fmt: skip
        return _entry(name, "mlxchat", summary["published"], own)

    def _third_party_entry(self, model: Model) -> dict[str, Any]:
        changed = datetime.fromtimestamp((model.folder / "config.json").stat().st_mtime, tz=UTC)
        own = {
            "digest": model.digest, "fingerprint": self.fingerprint(model.digest), "step": model.name,
            "converses": model.converses, "inputs": {}, "metrics": {}, "scores": {}, "prompts": [],
        }  # fmt: skip
        return _entry(model.name, "third-party", changed.isoformat(timespec="seconds"), own)


@lru_cache(maxsize=8)
def read_model(folder: Path) -> Model:
    """Return a checkpoint's metadata without loading its weights; DataError if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        context = int(config["max_position_embeddings"])
        digest = str(read_manifest(folder)["tree"])
    except (OSError, ValueError, KeyError, StoreError) as error:
        raise DataError(f"{folder.name}: the checkpoint cannot be read ({type(error).__name__}: {error})") from None
    return Model(folder.name, folder, Tokenizer.load(folder), context, facts.get("format") == "chat", digest)


@lru_cache(maxsize=8)
def read_third_party(name: str, folder: Path) -> Model:
    """Return a third-party model's metadata without its weights; DataError if mlx-lm cannot open it."""
    tokenizer, context_tokens = load_tokenizer(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model"))
    # The Hub's cache links to files named by their contents; elsewhere a changed file has a new mtime.
    facts = [(path.name, path.resolve().name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
    return Model(name, folder, tokenizer, context_tokens, tokenizer.has_chat_template, digest)


@lru_cache(maxsize=10_000)
def _prompts(path: Path) -> list[str]:
    """Return the first prompts of a file of samples."""
    prompts = (text(record.get("prompt")).strip() for record in Records(path).read())
    return list(dict.fromkeys(prompt for prompt in prompts if 0 < len(prompt) <= _MOST_PROMPT_CHARS))[:_MOST_PROMPTS]


def _entry(name: str, owner: str, published: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's entry of a model, with this server's own fields in `mlxchat`."""
    return {
        "id": name, "object": "model", "created": int(datetime.fromisoformat(published).timestamp()),
        "owned_by": owner, "mlxchat": {"published": published, **own},
    }  # fmt: skip


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}


def rows_that_fit(model: Model, limits: Limits, *, bits: int | None = None, held_bytes: int = 0) -> int:
    """Return how many rows of full context, at most `limits.max_rows`, fit into memory next to a model's weights.

    `held_bytes` are in use by other models, `bits` is as for `Engine`. ConfigError: not even one row fits.
    """
    if model.third_party:
        return limits.max_rows  # mlx-lm predicts no memory
    remedies = ["--max-models 1"] if held_bytes else []
    remedies += ["--bits 4"] if bits is None else ["a smaller --kept-tokens"]
    decoding = Decoding(
        sizes=sizes_of_folder(model.folder), device=find_device(), row_tokens=model.context_tokens,
        bits=bits, kept_tokens=limits.kept_tokens, remedies=tuple(remedies),
    )  # fmt: skip
    return decoding.rows(model.name, most=limits.max_rows, held_bytes=held_bytes)


def load_scheduler(model: Model, limits: Limits, *, bits: int | None = None) -> Scheduler:
    """Load a model's weights, quantised to `bits` if given, and return its scheduler; Fault if it does not fit."""
    if not model.third_party:
        check_model(model.folder)
    held = mx.get_active_memory()  # by other models
    try:
        rows = rows_that_fit(model, limits, bits=bits, held_bytes=held)
    except ConfigError as error:
        raise Fault(str(error), status=503) from None
    options: dict[str, Any] = {"max_rows": rows, "kept_tokens": limits.kept_tokens}
    if model.third_party:
        return ThirdPartyEngine.load(model.folder).scheduler(**options)
    weights, tokenizer, _ = load_for_inference(model.folder)
    if bits is not None:
        weights = packed_copy(weights, bits)
    return Engine(weights, tokenizer).scheduler(**options)
