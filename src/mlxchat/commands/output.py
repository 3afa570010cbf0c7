"""Plain data as JSON, values and times in the output of verbs."""

from __future__ import annotations

import json
from typing import Any

from mlxchat.errors import visible


def print_json(record: Any) -> None:
    """Print plain data as JSON."""
    print(visible(json.dumps(record, indent=1, ensure_ascii=False)))


def show_value(value: Any) -> str:
    """Return a value in YAML's notation, in one line."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def when(moment: str) -> str:
    """Return an ISO time to the minute."""
    return str(moment)[:16].replace("T", " ")
