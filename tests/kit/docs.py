"""Scripts in docs/ as modules, and the files and commands of docs/guides/own_parts.md."""

import importlib.util
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "guides" / "own_parts.md").read_text(encoding="utf-8")
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


@cache
def docs_module(name: str) -> ModuleType:
    """Return docs/NAME.py, which is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
