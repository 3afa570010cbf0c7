"""How two artifacts differ: settings, inputs, code, metrics, environment, contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxchat.store.environment import versions
from mlxchat.store.store import Manifest

Change = tuple[Any, Any]
_ABSENT = "absent"
_EXECUTION = ("seconds", "tokens_per_second", "data_wait_frac", "peak_memory_bytes")


def differences(old: Manifest, new: Manifest) -> dict[str, dict[str, Change]]:
    """Return section → key → (old, new) of everything that differs; sections without a difference are empty.

    Sections: config (what the ids cover), machine (settings that they do not), inputs, code, metrics, execution,
    environment, contents.
    """
    return {
        "config": _changes(_settings(old), _settings(new)),
        "machine": _changes(flatten(old.get("excluded", {})), flatten(new.get("excluded", {}))),
        "inputs": _changes(_inputs(old), _inputs(new)),
        "code": _changes(_code(old), _code(new)),
        "metrics": _changes(flatten(old.get("metrics", {})), flatten(new.get("metrics", {}))),
        "execution": _changes({key: old.get(key) for key in _EXECUTION}, {key: new.get(key) for key in _EXECUTION}),
        "environment": _changes(_environment(old), _environment(new)),
        "contents": _changes(_contents(old), _contents(new)),
    }


def environment_drift(made: Manifest, backend: str) -> dict[str, Change]:
    """Return what computed an artifact and would not now, the kind of device and MLX's version, as old and new.

    Keys do not cover them: results differ in their last bits alone.
    """
    before = {"device": (made.get("device") or {}).get("backend"), "mlx": (made.get("versions") or {}).get("mlx")}
    now = {"device": backend, "mlx": versions().get("mlx")}
    return {key: (old, now[key]) for key, old in before.items() if old is not None and old != now[key]}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested data as dotted key → value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Change]:
    keys = [*old, *(key for key in new if key not in old)]
    pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _settings(manifest: Manifest) -> dict[str, Any]:
    # The full configuration also shows fields that identities leave out.
    return {**flatten(manifest.get("full_config", {})), **flatten(manifest.get("config", {}))}


def _inputs(manifest: Manifest) -> dict[str, Any]:
    return {role: made.get("artifact", made.get("rid")) for role, made in (manifest.get("inputs") or {}).items()} | {
        f"pin {name}": value for name, value in (manifest.get("pins") or {}).items()
    }


def _code(manifest: Manifest) -> dict[str, Any]:
    git = manifest.get("git") or {}
    return {
        "stage": manifest.get("stage"), "version": manifest.get("version"), **flatten(manifest.get("code", {})),
        "git.commit": str(git.get("commit"))[:12], "git.dirty": git.get("dirty"),
    }  # fmt: skip


def _environment(manifest: Manifest) -> dict[str, Any]:
    host = (manifest.get("attempts") or [{}])[-1].get("host")
    return {**flatten(manifest.get("versions", {})), **flatten(manifest.get("device", {}), "device"), "host": host}


def _contents(manifest: Manifest) -> dict[str, Any]:
    return {file["path"]: file["sha256"][:12] for file in manifest.get("outputs", ())}
