"""Everyday questions in many wordings: small talk, sums, word problems, countries, choices, spelling, letters.

A small model answers a new wording only if it has seen many others. So the wordings (everyday.json) are combined with
openers, closing words, missing punctuation and lower case, and training conversations have up to three questions.
About a tenth of the wordings is held out: no training conversation asks with one of them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlxchat.tasks.answers import Conversation, answer_text, calculator_parts
from mlxchat.tasks.arithmetic import Template, draw_numbers, draw_words, solve
from mlxchat.tasks.base import Task, dialogue, held_out
from mlxchat.tasks.facts import KINDS, kind_names
from mlxchat.tasks.spelling import common_words, count_letters, first_words, is_only_spelled, is_test_word

_TEST_FRACTION = 0.1


@cache
def _texts() -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name("everyday.json").read_text(encoding="ascii")))


@cache
def _other_words() -> list[str]:
    """Return words that the model does not learn to spell; those that other tasks hold out are not among them."""
    return [word for word in common_words() if word not in first_words() and not is_test_word(word)]


_CALL = re.compile(r"<\|python_start\|>.*?<\|output_end\|>")


class Everyday(Task):
    """Everyday questions; a response is right if its text, without calculator calls, equals the reference."""

    name = "everyday"

    def _own_size(self) -> int:
        return 10_000 if self.split == "train" else 300

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        kinds = list(_KINDS)
        shares = [share for share, _ in _KINDS.values()]
        is_train = self.split == "train"
        messages: list[dict[str, Any]] = []
        for _ in range(rng.choice((1, 2, 3)) if is_train else 1):
            _, ask = _KINDS[rng.choices(kinds, shares)[0]]
            question, answer = ask(rng, is_train)
            content = calculator_parts(answer) if "<<" in answer else answer
            messages += dialogue(_vary(question, rng), content)["messages"]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the response without its calculator calls is the reference."""
        return _CALL.sub("", response).strip() == answer_text(conversation)


class FirstQuestions(Task):
    """Questions of newcomers, whose wordings no everyday conversation has; judged by a regular expression each."""

    name = "first_questions"
    splits = ("test",)
    training_splits = ()
    repeats = False

    def _own_size(self) -> int:
        return len(_first_questions())

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = _first_questions()[index]
        return dialogue(row["question"], row["expected"], accept=row["accept"], kind=row["kind"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the question's expression is in the response without its calculator calls."""
        return re.search(conversation["accept"], _CALL.sub("", response), re.IGNORECASE) is not None


@cache
def _first_questions() -> list[dict[str, str]]:
    lines = Path(__file__).with_name("first_questions.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line) for line in lines]


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
    hidden = {text for text in wordings if held_out(f"everyday/{text}", _TEST_FRACTION)} or {wordings[-1]}
    return rng.choice([text for text in wordings if (text not in hidden) == is_train])


def _asking(texts: dict[str, Any], rng: random.Random, is_train: bool) -> str:
    """Return a wording of the texts or a frame around a name of what is asked for; a name counts as three wordings."""
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
