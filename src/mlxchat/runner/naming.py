"""What a person may call an artifact, and which one is meant.

sft                             a step of the latest run
latest/sft, RUN/sft             a step of a run; the start of the run's name is enough
best, pins/best                 a pin
import:d32                      a model that was imported under this name
sft-d4-247by4vjkvu7s7hg         the folder's name, or the start of it
247by4                          the start of an id
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mlxchat.errors import StoreError, suggest
from mlxchat.runner.store import MANIFEST, Store, clean_label, read_manifest

PINS, IMPORTS = "pins", "imports"
_ID_CHARS = 16
_MOST_SHOWN = 8


def resolve(store: Store, name: str) -> Path:
    """Return the folder of the artifact that `name` means; of an alias, its own.

    Raises:
        StoreError: nothing, or more than one thing, has this name; the message lists what may be meant.
    """
    if name.startswith("import:"):
        return resolve_import(store, name.removeprefix("import:"))
    direct = [place for place in _exact(store, name) if place is not None]
    if direct:
        if len(set(direct)) == 1:
            return direct[0]
        raise StoreError(
            f'"{name}" is both a step of the latest run ({direct[0].name}) and a pin ({direct[1].name}): '
            f"say latest/{name} or {PINS}/{name}"
        )
    if "/" in name:
        return _in_group(store, *name.rsplit("/", 1))
    base = store.outputs / "store"
    found = sorted(folder for folder in _names(base) if folder == name or _may_mean(name, folder))
    places = [base / folder for folder in found if (base / folder / MANIFEST).exists()]
    if len(name) > _ID_CHARS:
        places = [place for place in places if place.name.startswith(name) or _rid(place).startswith(name)]
    exact = [place for place in places if place.name == name]
    places = exact or places
    if len(places) == 1 and name:
        return places[0]
    if places and name:
        shown = ", ".join(place.name for place in places[:_MOST_SHOWN])
        more = f" and {len(places) - _MOST_SHOWN} more" if len(places) > _MOST_SHOWN else ""
        raise StoreError(f'"{name}" is ambiguous in {store.outputs}: {shown}{more}. Give more of the id.')
    steps, pins = list(links(store, "latest")), list(links(store, PINS))
    known = f"Steps of the latest run: {', '.join(steps) or 'none yet: run mlxchat first'}."
    known += f" Pins: {', '.join(pins)}." if pins else ""
    hint = suggest(name, [*steps, *pins]) or suggest(name, _names(base)[:2000])
    raise StoreError(f'"{name}" is no artifact in {store.outputs}. {known}{hint}')


def resolve_import(store: Store, name: str) -> Path:
    """Return the folder of the model that was imported under a name, or by a pipeline that calls it so.

    Raises:
        StoreError: there is none, or more than one.
    """
    named = links(store, IMPORTS)
    if name in named:
        return named[name]
    base = store.outputs / "store"
    called: dict[str, list[Path]] = {}
    for folder in _names(base):
        if folder.startswith("imported-") and (base / folder / MANIFEST).exists():
            called.setdefault(folder.removeprefix("imported-")[: -_ID_CHARS - 1], []).append(base / folder)
    places = called.get(clean_label(name), [])
    if len(places) == 1:
        return places[0]
    if places:
        shown = ", ".join(sorted(place.name for place in places))
        raise StoreError(f'there are several imports called "{name}": {shown}. Name one: mlxchat import … --name NAME')
    known = sorted({*named, *called})
    text = f"Imports: {', '.join(known)}." if known else "Nothing was imported yet."
    raise StoreError(
        f'there is no import "{name}" in {store.outputs}. {text}{suggest(name, known)} '
        f"To import it: mlxchat import nanochat REPOSITORY --name {name}"
    )


def links(store: Store, group: str) -> dict[str, Path]:
    """Return name → artifact folder of a group of refs, those that lead to a complete artifact."""
    folder = store.outputs / "refs" / group
    found = {}
    for name in sorted(_names(folder)):
        try:
            target = os.readlink(folder / name)  # noqa: PTH115  (ten thousand of them)
        except OSError:
            continue
        place = store.outputs / "store" / os.path.basename(target)  # noqa: PTH119
        if (place / MANIFEST).exists():
            found[name] = place
    return found


def groups(store: Store) -> list[str]:
    """Return the names of all groups of refs: latest, pins, one for each run, and what people made."""
    return sorted(name for name in _names(store.outputs / "refs") if (store.outputs / "refs" / name).is_dir())


def _exact(store: Store, name: str) -> Iterator[Path | None]:
    if "/" not in name:
        for group in ("latest", PINS):
            yield links(store, group).get(name)


def _in_group(store: Store, group: str, step: str) -> Path:
    known = groups(store)
    chosen = [group] if group in known else [one for one in known if group and one.startswith(group)]
    if len(chosen) > 1:
        shown = ", ".join(chosen[:_MOST_SHOWN])
        raise StoreError(f'"{group}" is ambiguous: {shown}. Give more of the run\'s name.')
    if not chosen:
        raise StoreError(f'there is no run "{group}" with artifacts in {store.outputs}.{suggest(group, known)}')
    steps = links(store, chosen[0])
    if step not in steps:
        raise StoreError(
            f'{chosen[0]} has no "{step}": {", ".join(steps) or "nothing that is still there"}.{suggest(step, steps)}'
        )
    return steps[step]


def _may_mean(name: str, folder: str) -> bool:
    """Tell whether a name may be the start of an artifact's folder name or of its id."""
    return folder.startswith(name) or folder[-_ID_CHARS:].startswith(name[:_ID_CHARS])


def _names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]  # noqa: PTH208
    except OSError:
        return []


def _rid(place: Path) -> str:
    try:
        return str(read_manifest(place)["rid"])
    except (StoreError, KeyError):
        return ""
