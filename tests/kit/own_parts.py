"""The files and commands of docs/guides/own_parts.md."""

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "own_parts.md").read_text(encoding="utf-8")
_FILE = re.compile(r"# (\S+\.\w+)\n(.*)", re.S)
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^\$ (mlxchat .*)$", PAGE, re.M)]


def fenced(page: str, kinds: str = r"\w+") -> list[str]:
    """Return a page's fenced blocks of some kinds, those of folded notes without their indentation."""
    found = re.findall(rf"^( *)```(?:{kinds})\n(.*?)^\1```", page, re.M | re.S)
    return [re.sub(f"^{indent}", "", text, flags=re.M) for indent, text in found]


def write_files(folder: Path, page: str = PAGE) -> None:
    """Write a page's files, each of which begins with a comment that is its path."""
    for path, text in [found.groups() for block in fenced(page) if (found := _FILE.fullmatch(block))]:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for package in ("verse", "verse/conf", "verse/stages"):
        if (folder / "package" / package).is_dir():
            (folder / "package" / package / "__init__.py").touch()
