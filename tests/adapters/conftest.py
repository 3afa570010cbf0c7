"""A command line, for the verbs that deal with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlxchat.cli import main

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process; return its exit code and all that it said."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(each) for each in arguments])
        said = capsys.readouterr()
        return int(exit_.value.code or 0), said.out + said.err

    return run
