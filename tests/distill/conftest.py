"""A scripted teacher, and a folder to work in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.servers import Teacher
from mlxchat.distill import teacher as client


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with Teacher() as teacher:
        yield teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, with its own cache and one retry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXCHAT_TEACHER_API_KEY", raising=False)
    monkeypatch.setattr(client, "RETRIES", 1)
    return tmp_path
