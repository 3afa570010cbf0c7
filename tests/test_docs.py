"""README and docs: links lead somewhere, and commands name verbs, groups and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlxchat.config.verbs import VERBS

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"settings", "__pycache__", "sweep"}
# Pages that docs/reference.py generates when the site is built.
_NAMES = re.findall(r'"(\w+)": \w+_page', (ROOT / "docs" / "reference.py").read_text(encoding="utf-8"))
GENERATED = [ROOT / "docs" / "reference" / f"{name}.md" for name in _NAMES]
# Options that a page adds itself.
OWN = {"my_mixture", "words", "verse"}


def commands(text: str) -> list[str]:
    """Return the mlxchat command lines in fenced blocks and in code spans, with continued lines joined."""
    blocks = "\n".join(re.findall(r"^```(?:bash|console|text)\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?(?:\S*/)?mlxchat\b(.*)$", blocks, re.M)
    spans = re.findall(r"`mlxchat\b([^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.split("  #")[0].split(" && ")[0] for line in lines + spans]


def anchors(page: Path) -> list[str]:
    """Return the anchors of a page's titles."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_and_pictures_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path if path else page).resolve()
        if "://" in target or file in GENERATED:
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_existing_verbs_and_options(page: Path) -> None:
    unknown = []
    for command in commands(page.read_text(encoding="utf-8")):
        words = command.replace("'", "").split()
        first = words[0] if words else "run"
        if re.fullmatch(r"[a-z]+", first) and first not in VERBS:
            unknown.append(f"mlxchat{command}")
        for group, option in re.findall(r"(?<![\w.])(\w+)(?:@[\w.]+)?=([\w,…]+)", command):
            if group not in GROUPS:
                continue
            for name in option.split(","):
                deep = group == "model" and re.fullmatch(r"d\d+", name)
                if not (deep or name in OWN or name in ("NAME", "…") or (CONF / group / f"{name}.yaml").is_file()):
                    unknown.append(f"{group}={name}")
    assert unknown == []


def test_front_pages_are_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 200
    assert len((ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()) <= 60
    assert "make test" in PAGES[0].read_text(encoding="utf-8")
