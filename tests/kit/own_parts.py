"""The files and commands of docs/guides/own_parts.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "own_parts.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^\$ (mlxchat .*)$", PAGE, re.M)]


def write_files(folder: Path, page: str = PAGE) -> None:
    """Write a page's files, each of which begins with a comment that is its path."""
    for path, text in re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```", page, re.M | re.S):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for package in ("verse", "verse/conf", "verse/stages"):
        if (folder / "package" / package).is_dir():
            (folder / "package" / package / "__init__.py").touch()
