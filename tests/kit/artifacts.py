"""A store with models and adapters for them, published as stages would."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kit import models
from kit.models import VOCABULARY, make_tokenizer
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.store.catalog import check_contents, find_absent
from mlxchat.store.fingerprint import compute_key
from mlxchat.store.manifest import read_manifest
from mlxchat.store.store import Store

FACTS = {"stage": "sft", "format": "chat", "pretrain_batch_tokens": 512}
make_model = partial(models.make_model, num_heads=2, num_kv_heads=1, width=64, context_tokens=256, seed=3)


def publish(
    outputs: Path, step: str, write: Callable[[Path], None], *, stage: str = "sft", inputs: Mapping[str, Path] = {},
    **more: Any,
) -> Path:  # fmt: skip
    """Publish what `write` puts into a folder as an artifact, and return its place; `more` goes into the manifest."""
    store = Store(outputs)
    store.prepare()
    out = outputs / "work" / step / "out"
    out.mkdir(parents=True)
    write(out)
    made = {role: read_manifest(folder) for role, folder in inputs.items()}
    config = {"note": step}
    key = compute_key(stage, 1, config, {role: each["tree"] for role, each in made.items()}, {})
    keys = {"step": "step", "artifact": "name", "rid": "rid", "tree": "tree"}
    manifest = {
        "schema": 3, "key": key, "stage": stage, "step": step, "version": 1,
        "kind": "checkpoint", "published": "2026-11-22T00:00:00+00:00", "pins": {},
        "inputs": {role: {name: each[source] for name, source in keys.items()} for role, each in made.items()},
        "config": config, "full_config": {"sft": config}, "derived": {"num_iterations": 7}, "externals": [],
        "metrics": {}, "code": {}, "seconds": 1.0, **more,
    }  # fmt: skip
    place = store.publish(out, "d2", manifest)
    store.set_ref("made", step, place)
    store.link_group("latest", "made")
    return place


def publish_base(outputs: Path, step: str = "base", architecture: str = "oct2025", *, seed: int = 3) -> Path:
    model, tokenizer = make_model(architecture, seed=seed), make_tokenizer()
    return publish(outputs, step, lambda out: save_checkpoint(out, model, tokenizer, dict(FACTS)), stage="midtrain")


def some_ids(count: int = 200) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, VOCABULARY, (2, count)))


def find_faults(store: Store, folder: Path) -> list[str]:
    """Return everything about an artifact that is not as its manifest, or the store, requires."""
    return [*check_contents(folder), *find_absent(store, folder)]


def contents(store: Path) -> dict[str, bytes]:
    """Return path → bytes of all files in a folder."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
