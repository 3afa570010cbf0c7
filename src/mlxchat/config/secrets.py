"""Removes passwords and tokens of the environment from everything that is written or shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TypeVar

# HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, DB_PASSWORD, but not TOKENIZERS_PARALLELISM.
_NAME = re.compile(r"(^|_)(TOKEN|(API|ACCESS|PRIVATE)_?KEY)$|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# Shorter values occur in other text by chance.
_SHORTEST = 6

T = TypeVar("T")


def redact(value: T) -> T:
    """Return text or plain nested data in which every secret of the environment is replaced by the variable's name."""
    secrets = _secrets()
    return _replace(value, secrets) if secrets else value  # type: ignore[return-value]  # of the same type


def _secrets() -> dict[str, str]:
    """Return secret → replacement, the longest first, since one may contain another."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if _NAME.search(name) and len(value.strip()) >= _SHORTEST:
            from urllib.parse import quote

            for form in (value, value.strip(), quote(value.strip(), safe="")):
                found.setdefault(form, f"<{name}>")
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _replace(value: object, secrets: Mapping[str, str]) -> object:
    if isinstance(value, str):
        for secret, name in secrets.items():
            value = value.replace(secret, name)
        return value
    if isinstance(value, Mapping):
        return {_replace(key, secrets): _replace(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_replace(item, secrets) for item in value])
    return value
