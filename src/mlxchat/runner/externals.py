"""What a step reads from outside the store: pinned by content or version before it runs, looked at again after it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError
from mlxchat.runner.fingerprint import hash_file


def pin_externals(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return name → content hash or version of everything outside the store that the config refers to.

    Fields whose metadata says `external: file` hold paths, those with `external: package` names of packages.

    Raises:
        ConfigError: listing every file that cannot be read and every package that is not installed.
    """
    pins: dict[str, str] = {}
    problems: list[str] = []

    def visit(where: str, value: Any) -> None:
        if is_dataclass(value):
            for field in fields(value):
                item, kind = getattr(value, field.name), field.metadata.get("external")
                if kind is None:
                    visit(f"{where}.{field.name}", item)
                    continue
                for name in [item] if isinstance(item, str) else item or []:
                    try:
                        if kind == "file":
                            pins[f"file {len(pins)} {Path(name).name}"] = hash_file(Path(name))
                        else:
                            pins[f"package {name}"] = importlib.metadata.version(name)
                    except OSError as error:
                        problems.append(f"{where}.{field.name}: {name} cannot be read ({error.strerror})")
                    except importlib.metadata.PackageNotFoundError:
                        problems.append(f"{where}.{field.name}: package {name} is missing: pip install {name}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{where}.{key}", item)

    for section, value in sections.items():
        visit(section, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return pins
