"""mkdocs: the navigation by folder, the generated reference, and pages of the source files that the text links to.

Documents link to files of the checkout (`../../src/mlxchat/model/gpt.py#L40`), as is right on a code host. The site
has a page for each such file, so that every link works without a network and `--strict` checks it.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
from reference import pages

ROOT = Path(__file__).parents[1]
SECTIONS = ("course", "guides", "reference", "internals", "decisions")
_LINK = re.compile(r"(\]\()([^)\s#]*)(#L\d+)?([^)\s]*\))")
_LANGUAGES = {".py": "python", ".md": "markdown", ".yaml": "yaml", ".toml": "toml", ".sh": "sh", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the linked source files, and set the navigation."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for file in list(files.documentation_pages()):
        for match in _LINK.finditer(file.content_string):
            source = _outside(match[2], file.src_uri)
            if source and files.get_file_from_path(f"source/{source}.md") is None:
                content, hidden = _source_page(source), InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, f"source/{source}.md", content=content, inclusion=hidden))
    paths = [file.src_uri for file in files.documentation_pages() if file.inclusion.is_in_nav()]
    front = files.get_file_from_path("index.md")
    config.nav = _navigation(paths, re.findall(r"\]\(([^)#]+\.md)", front.content_string if front else ""))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files outside docs/ at their pages."""

    def changed(match: re.Match[str]) -> str:
        source = _outside(match[2], page.file.src_uri)
        if not source:
            return match[0]
        line = f"#__codelineno-0-{match[3][2:]}" if match[3] else ""
        up = "../" * page.file.src_uri.count("/")
        return f"{match[1]}{up}source/{source}.md{line}{match[4]}"

    return markdown if page.file.src_uri.startswith("source/") else _LINK.sub(changed, markdown)


def _outside(link: str, page: str) -> str:
    """Return the path in the checkout of what a page links to; empty if that is in docs/, elsewhere or missing."""
    if not link or ":" in link:
        return ""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    is_inside = path.startswith("docs/") and not path.endswith(".py")
    return "" if is_inside or path.startswith("..") or not (ROOT / path).exists() else path


def _source_page(path: str) -> str:
    """Return the page of a file, or of a folder with the names in it."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(f"{item.name}/" if item.is_dir() else item.name for item in place.iterdir())
        text, language = "\n".join(name for name in names if name[0] not in "._"), "text"
    else:
        text, language = place.read_text(encoding="utf-8").rstrip(), _LANGUAGES.get(place.suffix, "text")
    return f'---\nsearch: {{exclude: true}}\n---\n# {path}\n\n`````{language} linenums="1"\n{text}\n`````\n'


def _navigation(paths: list[str], linked: list[str]) -> list[Any]:
    """Return mkdocs's `nav`: the first page, then a section per folder, in the order of the first page's links."""
    order = {path: place for place, path in reversed(list(enumerate(linked)))}
    found: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for path in sorted(paths, key=lambda path: (not path.endswith("index.md"), order.get(path, len(linked)), path)):
        if path != "index.md":
            found.setdefault(path.partition("/")[0] if "/" in path else "internals", []).append(path)
    sections = [{section.capitalize(): entries} for section, entries in found.items() if entries]
    return ["index.md", *sections]
