"""The models of an outputs folder: their names, where they come from, and what their manifests say of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.constraint import JsonGrammars
from mlxchat.errors import DataError, StoreError, suggest
from mlxchat.serve.faults import Fault
from mlxchat.store.catalog import Summary, read_catalog
from mlxchat.store.fingerprint import canonical_json
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import find
from mlxchat.store.store import Store

_LISTED_SECONDS = 2.0
_NAME = re.compile(r"[\w.:@+-]+(/[\w.:@+-]+)*")
_MOST_NAME_CHARS, _SHOWN_CHARS, _MOST_SHOWN = 300, 80, 8


@dataclass(frozen=True)
class Model:
    """A checkpoint that may be asked."""

    name: str
    """Of its folder."""
    folder: Path
    tokenizer: Tokenizer
    context_tokens: int
    converses: bool
    """False: it was only pretrained and continues text."""
    digest: str = ""
    """Of the artifact's contents."""

    @cached_property
    def grammars(self) -> JsonGrammars:
        """What makes constraints for its vocabulary; a second to build for 65,536 tokens."""
        return JsonGrammars(self.tokenizer)


class Models:
    """What a server offers: every checkpoint of the outputs folder, and one that is meant when none is named."""

    def __init__(
        self, store: Store, default: Path, settings: Mapping[str, Any] | None = None, *, within: str | None = None
    ) -> None:
        """Take the store and the folder of the default model.

        Args:
            store: the outputs folder.
            default: the model that is meant where none is named.
            settings: the server's settings that change answers.
            within: the run whose steps go by their bare names; None: the latest one.
        """
        self.store, self.default, self._settings, self.within = store, default, dict(settings or {}), within
        self._listed: tuple[float, list[Summary]] = (-_LISTED_SECONDS, [])
        self._lock = threading.Lock()  # requests come from several threads; each file is read by one of them

    def find(self, name: str | None) -> Model:
        """Return a model by any name that `mlxchat show` would take; None or "default": the default one.

        Raises:
            Fault: there is none of that name, or it cannot be read.
        """
        try:
            place = self.default if name in (None, "", "default") else self._resolve(str(name))
            with self._lock:
                return read_model(place)
        except StoreError as error:
            raise self._damaged(error) from None
        except DataError as error:
            raise Fault(str(error), status=500) from None

    def entries(self) -> list[dict[str, Any]]:
        """Return OpenAI's entry of every model, the default one first, with an own field `mlxchat` of provenance."""
        found = self._summaries()
        scores = _scores(found)
        checkpoints = [summary for summary in reversed(found) if summary.get("kind") == "checkpoint"]
        checkpoints.sort(key=lambda summary: summary["folder"] != self.default.name)
        return [_entry(summary, scores, self.fingerprint(summary["tree"])) for summary in checkpoints]

    def fingerprint(self, digest: str) -> str:
        """Return the `system_fingerprint` of answers: it changes with the artifact's contents and server's settings."""
        return hashlib.sha256(canonical_json({"digest": digest, **self._settings}).encode()).hexdigest()[:16]

    def entry(self, name: str) -> dict[str, Any]:
        """Return OpenAI's entry of one model, with the settings that made it.

        Raises:
            Fault: there is none.
        """
        try:
            place = self.default if name == "default" else self._resolve(name)
        except StoreError as error:
            raise self._damaged(error) from None
        found = next(entry for entry in self.entries() if entry["id"] == place.name)
        manifest = read_manifest(place)
        found["mlxchat"] |= {"config": manifest.get("config"), "git": manifest.get("git"), "seed": manifest.get("seed")}
        return found

    def _unknown(self, name: str) -> Fault:
        entries = self.entries()
        ids = [entry["id"] for entry in entries]
        listed = ", ".join(ids[:_MOST_SHOWN]) + (
            f" and {len(ids) - _MOST_SHOWN} more" if len(ids) > _MOST_SHOWN else ""
        )
        hint = suggest(name[:_SHOWN_CHARS], sorted({entry["mlxchat"]["step"] for entry in entries} | set(ids)))
        return Fault(
            f"The model {name[:_SHOWN_CHARS]!r} does not exist. Models: {listed}.{hint}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip

    def _damaged(self, error: StoreError) -> Fault:
        # Where things lie on this machine is nobody's business who asks over the network.
        message = str(error).replace(str(self.store.outputs), "the outputs folder")
        return Fault(message, status=404, param="model", code="model_not_found")

    def _resolve(self, name: str) -> Path:
        if len(name) > _MOST_NAME_CHARS or not _NAME.fullmatch(name) or ".." in name.split("/"):
            raise self._unknown(name)
        try:
            place = find(self.store, name, within=self.within, paths=False).place
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
    """Return what is known of a checkpoint without its weights.

    Raises:
        DataError: it cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        context = int(config["max_position_embeddings"])
        digest = str(read_manifest(folder)["tree"])
    except (OSError, ValueError, KeyError, StoreError) as error:
        raise DataError(f"{folder.name}: no readable checkpoint ({type(error).__name__}: {error})") from None
    return Model(folder.name, folder, Tokenizer.load(folder), context, facts.get("format") == "chat", digest)


def _scores(found: list[Summary]) -> dict[str, dict[str, float]]:
    """Return id of a checkpoint → what the latest evaluation measured of it."""
    scores: dict[str, dict[str, float]] = {}
    for summary in found:
        judged = (summary.get("inputs") or {}).get("checkpoint")
        if summary.get("kind") == "scores" and judged:
            scores[judged["rid"]] = _numbers(summary["metrics"])
    return scores


def _entry(summary: Summary, scores: dict[str, dict[str, float]], fingerprint: str) -> dict[str, Any]:
    made_from = {role: made.get("artifact") for role, made in (summary.get("inputs") or {}).items() if made}
    return {
        "id": summary["folder"],
        "object": "model",
        "created": _seconds(summary["published"]),
        "owned_by": "mlxchat",
        "mlxchat": {
            "rid": summary["rid"],
            "digest": summary["tree"],
            "fingerprint": fingerprint,
            "step": summary["step"],
            "stage": summary["stage"],
            "run": summary.get("run"),
            "published": summary["published"],
            "converses": summary["stage"] != "pretrain",
            "inputs": made_from,
            "metrics": _numbers(summary["metrics"]),
            "scores": scores.get(summary["rid"], {}),
        },
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) and value == value}


def _seconds(published: str) -> int:
    try:
        return int(datetime.fromisoformat(published).timestamp())
    except ValueError:
        return 0
