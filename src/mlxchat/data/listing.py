"""What is known of a Hub corpus without reading any of its text: its files' sizes, from the artifact or a listing."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from mlxchat.config import HubConfig
from mlxchat.hub.cache import missing_bytes, read_json
from mlxchat.hub.files import HubFile
from mlxchat.hub.listings import recorded_files

LISTING = "corpus.json"
# Of FineWeb-Edu and ClimbMix: files of some 95 MB with 0.25 billion characters. Measured once a file is there.
ESTIMATED_CHARS_PER_BYTE = 2.6


@dataclass(frozen=True)
class Known:
    """The training files of a corpus, in order."""

    files: list[HubFile]
    chars_per_byte: float
    is_measured: bool

    @property
    def chars(self) -> float:
        """Characters of all files together."""
        return self.chars_per_byte * sum(file.bytes for file in self.files)

    def first(self, chars: float) -> list[HubFile]:
        """Return as many files as have so many characters together."""
        return self.files[: count_files([file.bytes for file in self.files], chars / self.chars_per_byte)]

    def missing_bytes(self, chars: float) -> int:
        """Return the bytes of them that are not on this machine."""
        return missing_bytes((file.blob, file.bytes) for file in self.first(chars) if not file.is_there())


def known_of_artifact(corpus: Path) -> Known | None:
    """Return what an artifact pins; None: it is no corpus of the Hub."""
    record = read_json(corpus / LISTING) or {}
    if "hub" not in record:
        return None
    hub = record["hub"]
    files = [HubFile(hub["repository"], hub["kind"], hub["revision"], *row[:4]) for row in record["shards"]]
    return Known(files, float(record["chars_per_byte"]), True)


def known_of_record(hub: HubConfig) -> Known | None:
    """Return what an earlier listing of the data set recorded; None: there is none. Nobody is asked."""
    files = recorded_files(hub.repository, hub.revision)
    held_out = hub.validation_files or ""
    train = [
        file
        for file in files or ()
        if fnmatch.fnmatchcase(file.path, hub.train_files) and not fnmatch.fnmatchcase(file.path, held_out)
    ][: hub.num_train_files]
    return Known(train, ESTIMATED_CHARS_PER_BYTE, False) if train else None


def count_files(sizes: list[int], wanted_bytes: float) -> int:
    """Return how many files, from the first, have so many bytes together; all, if all have fewer."""
    total = 0
    for count, size in enumerate(sizes, 1):
        total += size
        if total >= wanted_bytes:
            return count
    return len(sizes)
