"""Early cutoff: a step whose inputs have the bytes of a step made before gets that one's artifact, by alias.

A step's id is known before anything runs, so it is made of the ids of its inputs. Once the inputs exist, their contents
are known too: the action key is the same hash with the inputs' digests in place of their ids. Equal action keys mean an
equal result, so what was rebuilt with the same bytes, or from other settings that come to the same, runs nothing below.

    store/<name>-<rid16>/manifest.json    all there is of an alias: `alias_of` is the id of the artifact with the files
    index/act/<action key>                the id of the artifact made under it; a hint, never believed unseen
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import StoreError
from mlxchat.runner.crash import crash_point
from mlxchat.runner.fingerprint import compute_rid
from mlxchat.runner.records import now
from mlxchat.runner.store import Manifest, Store

if TYPE_CHECKING:
    from mlxchat.runner.plan import PlannedStep

_RID = re.compile(r"[a-z2-7]{52}")
# So many artifacts of a stage, the newest, are looked through; more would make planning slow in a large store.
MOST_CANDIDATES = 200


def action_key(step: PlannedStep, input_trees: Mapping[str, str]) -> str:
    """Return the key of what a step does, 52 characters like an id: stage, version, config, pins, contents of inputs.

    Args:
        step: its identity.
        input_trees: role → digest of the artifact's contents.
    """
    return compute_rid(step.stage.name, step.stage.version, step.identity, input_trees, step.externals)


def key_of(manifest: Manifest) -> str:
    """Return the action key under which an artifact was made."""
    trees = {role: made["tree"] for role, made in manifest["inputs"].items()}
    return compute_rid(manifest["stage"], manifest["version"], manifest["config"], trees, manifest.get("pins", {}))


def remember_action(store: Store, akey: str, rid: str) -> None:
    """Note under which action key an artifact was made. A note that cannot be written costs nothing but a search."""
    place = store.outputs / "index" / "act" / akey
    temporary = store.outputs / "index" / f".{akey}"  # where what a killed process leaves is swept away
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(rid + "\n", encoding="ascii")
        crash_point("index.written")
        temporary.replace(place)


def find_action(store: Store, akey: str, stage: str | None = None) -> Manifest | None:
    """Return the manifest of the artifact with files that was made under an action key, or None.

    Args:
        store: where to look.
        akey: the key.
        stage: artifacts of this stage are looked through if no note leads to one (a store from before there were
            notes, or one whose index is gone or damaged).
    """
    try:
        rid = (store.outputs / "index" / "act" / akey).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        rid = ""
    made = _original(store, rid, akey) if _RID.fullmatch(rid) else None
    if made is not None or stage is None:
        return made
    for manifest in recent_artifacts(store, stage):
        if (made := _original(store, manifest["rid"], akey)) is not None:
            return made
    return None


def _original(store: Store, rid: str, akey: str) -> Manifest | None:
    """Return the manifest of the artifact with files behind an id, if the key is its own."""
    with suppress(StoreError, KeyError, TypeError, AttributeError):
        manifest = store.read(rid)
        if manifest is not None and manifest.get("alias_of") is not None:
            manifest = store.read(manifest["alias_of"])
        if manifest is not None and key_of(manifest) == akey:
            return manifest
    return None


def recent_artifacts(store: Store, stage: str) -> Iterator[Manifest]:
    """Yield the manifests of the newest artifacts of a stage, at most MOST_CANDIDATES, the newest first.

    Damaged ones are left out: whoever needs them is told by `Store.find`.
    """
    for name in store.newest(stage)[:MOST_CANDIDATES]:
        with suppress(StoreError):
            manifest = store.manifest_of(store.outputs / "store" / name)
            if manifest.get("stage") == stage:
                yield manifest


def publish_alias(
    store: Store, step: PlannedStep, original: Manifest, inputs: Mapping[str, Manifest], facts: Mapping[str, Any]
) -> Path:
    """Give a step the artifact that another one made; return the folder with its files. The caller holds the lock.

    Args:
        store: where both are.
        step: whose id the alias bears.
        original: of the artifact with the files.
        inputs: role → what a manifest records of the step's own inputs.
        facts: what else is the step's own: run, overrides, command line.
    """
    manifest = {
        **original,
        **facts,
        "rid": step.rid,
        "name": step.artifact,
        "step": step.name,
        "inputs": dict(inputs),
        "akey": key_of(original),
        "alias_of": original["rid"],
        "published": now(),
    }
    work = store.work(step.rid)
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir(parents=True)
    store.publish(work / "out", step.artifact, manifest)
    shutil.rmtree(work, ignore_errors=True)
    place = store.find(step.rid)
    if place is None:
        raise StoreError(f"{original['name']}, which {step.name} would share, is no longer in {store.outputs}")
    return place
