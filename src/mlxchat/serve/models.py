"""The models of a server: names, provenance, metadata from their files, and loading."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from mlxchat.config.secrets import redact
from mlxchat.data.conversation import render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Scheduler
from mlxchat.engine.sample import JsonGrammars
from mlxchat.engine.third_party import ThirdPartyEngine, ThirdPartyTokenizer, load_tokenizer
from mlxchat.errors import ConfigError, DataError, StoreError, suggest
from mlxchat.interop.source import PREFIX
from mlxchat.model.sizes import count_parameters
from mlxchat.planning.inputs import sizes_of_folder
from mlxchat.planning.memory import Decoding, find_device
from mlxchat.report.collect import STAGE_LABELS, read_jsonl, text
from mlxchat.serve.security import Fault, Limits
from mlxchat.store.catalog import Summary, read_catalog
from mlxchat.store.fingerprint import canonical_json
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import find
from mlxchat.store.store import Store
from mlxchat.store.verify import check_model

# libyaml is nine times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_log = logging.getLogger("mlxchat.serve")
_LISTED_SECONDS = 2.0
_NAME = re.compile(r"[\w.:@+-]+(/[\w.:@+-]+)*")
_MOST_NAME_CHARS, _SHOWN_CHARS, _MOST_SHOWN = 300, 80, 8
_MOST_PROMPTS, _MOST_PROMPT_CHARS = 4, 200
_TELLING = ("chatcore", "mean_centered", "core", "pass_at_1", "val_bpb", "val_loss")
"""Scores that tell models of one step apart: the first one that is known."""


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
        """Return the prompt ids for the assistant's next message.

        Raises:
            DataError: a third-party chat template refuses the conversation.
        """
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
        self._listed: tuple[float, list[Summary]] = (-_LISTED_SECONDS, [])
        self._lock = threading.Lock()  # requests come from several threads; only one reads files at a time

    def find(self, name: str | None) -> Model:
        """Return a model by any name that `mlxchat show` accepts; the default model for None or "default".

        Raises:
            Fault: no model has that name, or it cannot be read.
        """
        place = self._place(name)
        try:
            with self._lock:
                return self._read(place)
        except DataError as error:
            # Clients must not see this machine's paths.
            raise Fault(str(error).replace(f"{place.parent}/", ""), status=500) from None

    def entries(self) -> list[dict[str, Any]]:
        """Return OpenAI's entry of every model, the default first, with provenance in the extra field `mlxchat`."""
        found = self._summaries()
        judges = _judges(found)
        entries = []
        for summary in reversed(found):
            if summary.get("kind") == "checkpoint":
                parameters = _num_parameters(self.store.outputs / "store" / summary["folder"])
                fingerprint = self.fingerprint(summary["tree"])
                judge = judges.get(summary["rid"], {})
                asked = summary if summary["stage"] == "pretrain" else judge or summary
                prompts = _prompts(self.store.outputs / "store" / asked["folder"] / "samples.jsonl")
                if not prompts and summary.get("run"):  # it is not evaluated yet
                    prompts = _planned_prompts(self.store.outputs / "runs" / Path(summary["run"]).name / "config.yaml")
                scores = _numbers(judge.get("metrics", {}))
                entries.append(_own_entry(summary, scores, fingerprint, parameters, prompts))
        with self._lock:
            others = [self._read(folder) for folder in self._third_party.values()]
        entries += [_third_party_entry(model, self.fingerprint(model.digest)) for model in others]
        _tell_apart(entries, self.store)
        return sorted(entries, key=lambda entry: entry["id"] != self._names.get(self.default, self.default.name))

    def fingerprint(self, digest: str) -> str:
        """Return the `system_fingerprint` of answers, a hash of the artifact's contents and the server's settings."""
        return hashlib.sha256(canonical_json({"digest": digest, **self._settings}).encode()).hexdigest()[:16]

    def entry(self, name: str) -> dict[str, Any]:
        """Return OpenAI's entry of one model, with the configuration of its training.

        Raises:
            Fault: no model has that name.
        """
        place = self._place(name)
        found = next(entry for entry in self.entries() if entry["id"] == self._names.get(place, place.name))
        if place in self._names:
            # Some config.json contain Infinity, which is not JSON.
            config = json.loads((place / "config.json").read_text(encoding="utf-8"), parse_constant=str)
            found["mlxchat"] |= {"config": config, "git": None, "seed": None}
            return found
        manifest = read_manifest(place)
        found["mlxchat"] |= {"config": manifest.get("config"), "git": manifest.get("git"), "seed": manifest.get("seed")}
        return found

    def _read(self, place: Path) -> Model:
        name = self._names.get(place)
        return read_model(place) if name is None else read_third_party(name, place)

    def _unknown(self, name: str) -> Fault:
        entries = self.entries()
        ids = [entry["id"] for entry in entries]
        more = f" and {len(ids) - _MOST_SHOWN} more" if len(ids) > _MOST_SHOWN else ""
        listed = ", ".join(ids[:_MOST_SHOWN]) + more
        hint = suggest(name[:_SHOWN_CHARS], sorted({entry["mlxchat"]["step"] for entry in entries} | set(ids)))
        return Fault(
            f"The model {name[:_SHOWN_CHARS]!r} does not exist. Models: {listed}.{hint}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip

    def _place(self, name: str | None) -> Path:
        """Return a model's folder; the default model's for None or "default"."""
        if name in (None, "", "default"):
            return self.default
        try:
            return self._resolve(str(name))
        except StoreError as error:
            # Clients must not see this machine's paths.
            message = str(error).replace(str(self.store.outputs), "the outputs folder")
            raise Fault(message, status=404, param="model", code="model_not_found") from None

    def _resolve(self, name: str) -> Path:
        if (folder := self._third_party.get(name.removeprefix(PREFIX))) is not None:
            return folder
        if len(name) > _MOST_NAME_CHARS or not _NAME.fullmatch(name) or ".." in name.split("/"):
            raise self._unknown(name)
        try:
            place = find(self.store, name).place
        except StoreError:  # lists artifacts of every kind
            raise self._unknown(name) from None
        if read_manifest(place)["kind"] != "checkpoint":
            raise self._unknown(name)
        return place

    def _summaries(self) -> list[Summary]:
        with self._lock:
            now = time.monotonic()
            if now - self._listed[0] >= _LISTED_SECONDS:
                readable = [summary for summary in read_catalog(self.store) if "damaged" not in summary]
                self._listed = now, readable
            return self._listed[1]


@lru_cache(maxsize=8)
def read_model(folder: Path) -> Model:
    """Return a checkpoint's metadata without loading its weights.

    Raises:
        DataError: it cannot be read.
    """
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
    """Return a third-party model's metadata without loading its weights.

    Raises:
        ConfigError: mlx-lm is not installed.
        DataError: mlx-lm cannot open it.
    """
    tokenizer, context_tokens = load_tokenizer(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model"))
    # The Hub's cache links to files named by their contents; elsewhere a changed file has a new mtime.
    facts = [(path.name, path.resolve().name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
    return Model(name, folder, tokenizer, context_tokens, tokenizer.has_chat_template, digest)


def _judges(found: list[Summary]) -> dict[str, Summary]:
    """Return id of a checkpoint → its latest evaluation."""
    scored = (summary for summary in found if summary.get("kind") == "scores")
    return {made["rid"]: summary for summary in scored if (made := (summary.get("inputs") or {}).get("checkpoint"))}


@lru_cache(maxsize=10_000)
def _prompts(path: Path) -> list[str]:
    """Return the first prompts of a file of samples."""
    prompts = (text(record.get("prompt")).strip() for record in read_jsonl(path))
    return list(dict.fromkeys(prompt for prompt in prompts if 0 < len(prompt) <= _MOST_PROMPT_CHARS))[:_MOST_PROMPTS]


@lru_cache(maxsize=1000)
def _planned_prompts(path: Path) -> list[str]:
    """Return the first of `eval.prompts` of a run's settings."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        return [str(prompt)[:_MOST_PROMPT_CHARS] for prompt in settings["eval"]["prompts"]][:_MOST_PROMPTS]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return []


def _tell_apart(entries: list[dict[str, Any]], store: Store) -> None:
    """Add `details`: what distinguishes models of equal step and size, as far as run, settings and score differ."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        own = entry["mlxchat"] | {"details": ""}
        entry["mlxchat"] = own
        alike.setdefault((own["step"], own.get("parameters")), []).append(entry)
    for group in alike.values():
        facts = [_facts(entry, store) for entry in group]
        for entry, (run, settings, score) in zip(group, facts, strict=True) if len(group) > 1 else ():
            runs, scores = ({fact[at] for fact in facts} for at in (0, 2))
            differing = [each for each in settings if not all(each in fact[1] for fact in facts)]
            parts = [run if len(runs) > 1 else "", " ".join(differing), score if len(scores) > 1 else ""]
            entry["mlxchat"]["details"] = " · ".join(filter(None, parts))


def _facts(entry: dict[str, Any], store: Store) -> tuple[str, tuple[str, ...], str]:
    """Return the run's name without its time, the settings given for it except paths, and a score of a model."""
    own = entry["mlxchat"]
    numbers = {**own["metrics"], **own["scores"]}
    scores = (f"{name.replace('_', ' ')} {numbers[name]:.4g}" for name in _TELLING if name in numbers)
    settings = _overrides(store.outputs / "store" / entry["id"]) if "rid" in own else ()
    return re.sub(r"^[\d-]+-", "", own.get("run") or ""), settings, next(scores, "")


@lru_cache(maxsize=10_000)
def _overrides(folder: Path) -> tuple[str, ...]:
    try:
        manifest = read_manifest(folder)
    except StoreError:
        return ()
    # Later trainings and evaluations of its run did not change the model.
    later = (*STAGE_LABELS, "eval")[[*STAGE_LABELS, manifest["stage"]].index(manifest["stage"]) + 1 :]
    others = ("outputs=", "stage=", *(f"{stage}." for stage in later))
    given = manifest.get("overrides") or ()
    return tuple(redact([each for each in given if "/" not in each and not each.startswith(others)]))


@lru_cache(maxsize=10_000)
def _num_parameters(folder: Path) -> int | None:
    """Return a checkpoint's number of parameters (its base model's for adapters); None if it cannot be read."""
    try:
        return count_parameters(sizes_of_folder(folder))["total"]
    except (OSError, ValueError, DataError):
        return None


def _entry(name: str, owner: str, published: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's entry of a model, with this server's own fields in `mlxchat`."""
    return {
        "id": name, "object": "model", "created": _seconds(published), "owned_by": owner,
        "mlxchat": {"published": published, **own},
    }  # fmt: skip


def _own_entry(
    summary: Summary, scores: dict[str, float], fingerprint: str, parameters: int | None, prompts: list[str]
) -> dict[str, Any]:
    name, stage = summary["folder"], summary["stage"]
    own = {
        "rid": summary["rid"],
        "digest": summary["tree"],
        "fingerprint": fingerprint,
        "step": summary["step"],
        "stage": stage,
        "label": name.removeprefix(f"{stage}-").rpartition("-")[0],
        "parameters": parameters,
        "run": summary.get("run"),
        "converses": stage != "pretrain",
        "inputs": {role: made.get("artifact") for role, made in (summary.get("inputs") or {}).items() if made},
        "metrics": _numbers(summary["metrics"]),
        "scores": scores,
        "prompts": prompts,
    }
    return _entry(name, "mlxchat", summary["published"], own)


def _third_party_entry(model: Model, fingerprint: str) -> dict[str, Any]:
    changed = datetime.fromtimestamp((model.folder / "config.json").stat().st_mtime, tz=UTC)
    own = {
        "digest": model.digest, "fingerprint": fingerprint, "step": model.name, "converses": model.converses,
        "inputs": {}, "metrics": {}, "scores": {}, "prompts": [],
    }  # fmt: skip
    return _entry(model.name, "third-party", changed.isoformat(timespec="seconds"), own)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}


def _seconds(published: str) -> int:
    try:
        return int(datetime.fromisoformat(published).timestamp())
    except ValueError:
        return 0


def rows_that_fit(model: Model, limits: Limits, *, bits: int | None = None, held_bytes: int = 0) -> int:
    """Return how many rows of full context fit into memory next to a model's weights, at most `limits.max_rows`.

    `held_bytes` are in use by other models; other arguments are as for `load_scheduler`.

    Raises:
        ConfigError: not even one row fits.
    """
    if model.third_party:
        return limits.max_rows  # mlx-lm predicts no memory
    remedies = [f"--max-models {limits.max_models - 1}"] if held_bytes and limits.max_models > 1 else []
    remedies += ["--bits 4"] if bits is None else []
    remedies += ["a smaller --kept-tokens"] if limits.kept_tokens else []
    decoding = Decoding(
        sizes=sizes_of_folder(model.folder), device=find_device(), row_tokens=model.context_tokens,
        bits=bits, kept_tokens=limits.kept_tokens, remedies=tuple(remedies),
    )  # fmt: skip
    return decoding.rows(model.name, most=limits.max_rows, held_bytes=held_bytes)


def load_scheduler(model: Model, limits: Limits, *, bits: int | None = None) -> Scheduler:
    """Load a model's weights and return its scheduler.

    `bits` is as for `Engine`; the log says what the quantisation costs.

    Raises:
        Fault: it does not fit into memory.
    """
    import mlx.core as mx

    from mlxchat.engine.generate import Engine
    from mlxchat.model.checkpoint import load_for_inference

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
        from mlxchat.evals.quantised import measure_quantised

        weights, cost = measure_quantised(weights, tokenizer, bits)
        _log.log(logging.WARNING if cost.bad else logging.INFO, "%s: %s", model.name, cost)
    return Engine(weights, tokenizer).scheduler(**options)
