"""Read what steps wrote without ever raising: what is absent or damaged is empty or None.

Records come from JSON, where any field may be missing or of another type; `number`, `mapping`, `sequence` and
`text` turn such a field into the type that the report expects.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# The largest safetensors header worth reading, as in the format's own reader.
HEADER_LIMIT_BYTES = 100_000_000


def number(value: object) -> float | None:
    """Return `value` if it is a finite number (booleans are not), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def mapping(value: object) -> dict[str, Any]:
    """Return `value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str:
    """Return a string as it is, None as nothing, and anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if the file is absent or unreadable."""
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as fault:
        log.warning("%s cannot be read and is left out of the report: %s", path, fault)
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a last line cut short by a crash is ignored."""
    try:
        # A cut can fall inside a character, hence "replace".
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as fault:
        log.warning("%s cannot be read and is left out of the report: %s", path, fault)
        return []
    records = []
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if any(rest.strip() for rest in lines[position + 1 :]):
                log.warning("%s line %d is no JSON and is ignored", path, position + 1)
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def count_parameters(path: Path) -> int | None:
    """Return how many numbers a safetensors file holds by its header, None if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = mapping(json.loads(file.read(length))) if length <= HEADER_LIMIT_BYTES else {}
        shapes = [mapping(t).get("shape") for name, t in header.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in shapes if isinstance(shape, list)) or None
    except (OSError, ValueError, TypeError):
        return None
