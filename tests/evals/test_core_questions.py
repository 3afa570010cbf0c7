"""CORE's prompts, draws, spans and crops, against jinja2, random and plain loops."""

import random
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxchat.errors import DataError
from mlxchat.evals.core_bundle import CoreTask
from mlxchat.evals.core_questions import common_prefix, crop, draw_shots, render_prompts, tokenize_prompts

SHOTS = "{%% for s in shots %%}%s\n\n{%% endfor %%}"
TEMPLATES = {
    "multiple_choice": SHOTS % "{{ s.query }}{{ d }}{{ s.choices[s.gold] }}" + "{{ i.query }}{{ d }}{{ o }}",
    "schema": SHOTS % "{{ s.context_options[s.gold] }}{{ d }}{{ s.continuation }}"
    + "{{ o }}{{ d }}{{ i.continuation }}",
    "language_modeling": SHOTS % "{{ s.context | trim }}{{ d }}{{ s.continuation }}"
    + "{{ i.context | trim }}{{ d }}{{ o }}",
}
TEXTS = st.text(st.sampled_from(" ab{}%#<&\n\té你"), max_size=12)


def task_of(kind: str, *, shots: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask(label="task", kind=kind, data="", num_fewshot=shots, delimiter=delimiter, baseline=0.25)


@st.composite
def items(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    options = draw(st.lists(TEXTS, min_size=2, max_size=3))
    if kind == "multiple_choice":
        return {"query": draw(TEXTS), "choices": options, "gold": draw(st.integers(0, len(options) - 1))}
    if kind == "schema":
        gold = draw(st.integers(0, len(options) - 1))
        return {"context_options": options, "continuation": draw(TEXTS), "gold": gold}
    return {"context": draw(TEXTS), "continuation": draw(TEXTS)}


@pytest.mark.parametrize("kind", list(TEMPLATES))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_prompts_are_what_jinja_renders(kind, data):
    item, delimiter = data.draw(items(kind)), data.draw(st.sampled_from([" ", "\nAnswer: ", ""]))
    shots = data.draw(st.lists(items(kind), max_size=2))
    # A template's own last line break goes, the texts' stay.
    template = jinja2.Environment(keep_trailing_newline=True).from_string(TEMPLATES[kind])
    options = item.get("choices") or item.get("context_options") or ["", item["continuation"]]
    expected = [template.render(shots=shots, i=item, d=delimiter, o=option) for option in options]
    if kind == "language_modeling":
        expected[0] = expected[0].strip()
    assert render_prompts(task_of(kind, delimiter=delimiter), item, shots) == expected


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 400), shots=st.integers(1, 10), data=st.data())
def test_shots_are_drawn_as_nanochat_does(count, shots, data):
    index = data.draw(st.integers(0, count - 1))
    shots = min(shots, count - 1)
    others = [place for place in range(count) if place != index]
    assert draw_shots(index, count, shots) == random.Random(1234 + index).sample(others, shots)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_common_prefix(sequences):
    expected = 0
    while all(len(each) > expected and each[expected] == sequences[0][expected] for each in sequences):
        expected += 1
    assert common_prefix(sequences) == expected


def test_scored_spans_of_choices_and_schemas(tokenizer):
    prompts = ["the cat sat", "the cat ran"]
    sequences, starts = tokenize_prompts("multiple_choice", prompts, tokenizer)
    assert [tokenizer.decode(tokens[start:]) for tokens, start in zip(sequences, starts, strict=True)] == [
        " sat",
        " ran",
    ]
    sequences, starts = tokenize_prompts("schema", ["a cat sat", "a dogs sat"], tokenizer)
    assert {tokenizer.decode(tokens[start:]) for tokens, start in zip(sequences, starts, strict=True)} == {" sat"}


def test_merged_continuation_is_scored_from_where_they_differ(tokenizer):
    prompts = ["the ca", "the cat"]  # "at" is one token
    sequences, starts = tokenize_prompts("language_modeling", prompts, tokenizer)
    assert tokenizer.decode(sequences[0][starts[0] :]) == "at"
    with pytest.raises(DataError, match="prefix"):
        tokenize_prompts("language_modeling", prompts, tokenizer, strict=True)


def test_long_prompts_are_cropped_at_the_front():
    sequences, starts = [list(range(10)), list(range(12))], [8, 8]
    assert crop(sequences, starts, 12) == (sequences, starts, False)
    assert crop(sequences, starts, 9) == ([list(range(1, 10)), list(range(3, 12))], [7, 5], True)
    assert crop([list(range(20))], [5], 8) == ([list(range(12, 20))], [1], True)
