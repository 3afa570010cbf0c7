"""A scripted teacher, and a folder to work in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.servers import Teacher
from mlxchat.distill import collect


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with Teacher() as teacher:
        yield teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, with its own cache and short pauses between retries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXCHAT_TEACHER_API_KEY", raising=False)
    monkeypatch.setattr(collect, "FIRST_PAUSE_SECONDS", 0.001)
    return tmp_path
