"""What a step's key and its record hold besides settings and inputs: pins of external data, digests of code."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Container, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxchat.config.pins import UNKNOWN, find_own_files
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.store.fingerprint import hash_file, is_identity

PACKAGE = "mlxchat"
# Parts of the package that do not affect artifacts.
_LEFT_OUT = frozenset({
    "runner", "store", "commands", "report", "bench", "sweep", "serve", "terminal", "cli", "composition", "trackers",
    "errors", "config", "conf", "stages", "__init__", "__main__",
})  # fmt: skip


def pin_externals(
    sections: Mapping[str, Any], hash_of: Callable[[Path], str] = hash_file, unread: Container[str] = ()
) -> dict[str, str]:
    """Return name → content hash or version of the external data of sections (config/pins.py), without the `unread`."""
    pins: dict[str, str] = {}
    problems: list[str] = []

    def visit(where: str, value: Any) -> None:
        if where in unread:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{where}.{key}", item)
        for field in fields(value) if is_dataclass(value) else ():
            place, item, pin = f"{where}.{field.name}", getattr(value, field.name), field.metadata.get("pin")
            if "external" in field.metadata:
                problems.append(f'{place}: metadata={{"external": …}} was for version 0.2. Write {{"pin": File()}}')
            if pin is None:
                if is_identity(field):  # settings that change no result have no pins
                    visit(place, item)
                continue
            try:
                pins.update(pin.pins(place, item, value, hash_of) if place not in unread else {})
            except ConfigError as error:
                problems.append(f"{place}: {error}")
            except OSError as error:
                problems.append(f"{place}: {error.filename or item} cannot be read ({error.strerror})")
            except importlib.metadata.PackageNotFoundError as error:
                problems.append(f"{place}: package {error.name} is missing: pip install {error.name}")

    for section, value in sections.items():
        visit(section, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return pins


def check_pins(
    step: str, pins: Mapping[str, str], sections: Mapping[str, Any], when: str, unread: Container[str]
) -> None:
    """Raise StepFailed if the pins of a step's key no longer hold; `when` they changed is for the message."""
    try:
        now = pin_externals(sections, unread=unread)
    except ConfigError as error:
        raise StepFailed(f"step {step}: {error}") from None
    if changed := changed_names(pins, now):
        names = ", ".join(name.partition(" ")[2] for name in changed)
        what = "Nothing was published, since it would not be what its id says. Run the same command again"
        raise StepFailed(f"step {step}: {names} changed {when}. {what} when it no longer changes.")


def find_unknown(pins: Mapping[str, str]) -> dict[str, str]:
    """Return place in the configuration → description of the pins that are still unknown."""
    unknown = {name: value for name, value in pins.items() if value.startswith(UNKNOWN)}
    return {name.partition(" ")[2]: value.removeprefix(UNKNOWN) for name, value in unknown.items()}


@cache
def package_digest(library: Path = Path(__file__).parents[1]) -> str:
    """Return the digest of all files of the package that affect artifacts, 16 hex digits."""
    content = hashlib.sha256()
    for path in sorted(library.rglob("*")):
        name = path.relative_to(library)
        if path.is_file() and "__pycache__" not in name.parts and name.parts[0].removesuffix(".py") not in _LEFT_OUT:
            content.update(f"{name.as_posix()}\n{hash_file(path)}\n".encode())
    return content.hexdigest()[:16]


def code_of_stage(path: Path, module: str, root: Path | None = None) -> dict[str, str]:
    """Return name → digest of the code that a stage runs: the package, its file, and a user's stage's own imports.

    The user's modules are in the folder `root`; None: the current one.
    """
    files = {f"stages/{path.name}": path}
    if not module.startswith(f"{PACKAGE}."):
        own = find_own_files({module: path}, root)
        files |= {shown: file for dotted, (shown, file) in sorted(own.items()) if dotted != module}
    return {PACKAGE: package_digest(), **{name: hash_file(file)[:16] for name, file in files.items()}}


def changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names with different digests, or that only one side has."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
