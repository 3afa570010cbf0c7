"""The tasks' conversations, orders, parsing and verdicts; the tokenizer; token ids and masks of conversations.

Where our verdicts differ from nanochat's on purpose, our documented rule is compared.
"""

import base64
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import render_conversation, render_for_completion
from mlxchat.data.tokens import shuffled_places
from mlxchat.data.vocabulary import SPLIT_PATTERN
from mlxchat.errors import DataError
from mlxchat.tasks import Task, load_task, task_class
from mlxchat.tasks.base import is_right_by_nanochat, nanochat_number, render_mc
from mlxchat.tasks.downloads import Rows, extract_imports, extract_program
from mlxchat.tasks.jsonl import read_conversations
from parity.values import assert_same, of_files

each_file = of_files("tasks_*.json")


def task_of(name: str, split: str, data: dict[str, Any], folder: Path) -> Task:
    """Return a task that reads the file's rows from parquet, as from the Hub."""
    cls: Any = task_class(name)
    task = cls(split)
    pq.write_table(pa.Table.from_pylist(data["rows"]), folder / "rows.parquet")
    task.rows = Rows([folder / "rows.parquet"], cls.columns, seed=data.get("shuffle_seed", 42))
    return task


def everything(task: Task) -> list[dict[str, Any]]:
    return [task[index] for index in range(len(task))]


@each_file
@pytest.mark.parametrize(
    ("section", "name", "split"),
    [("gsm8k", "gsm8k", "train"), ("mmlu", "mmlu", "test"), ("arc", "arc_easy", "test"),
     ("humaneval", "humaneval", "test"), ("smoltalk", "smoltalk", "train")],
)  # fmt: skip
def test_conversations_and_their_order(values, section, name, split, tmp_path):
    """By nanochat's keys; ours also have the answer of a choice."""
    data = values.json[section]
    task, expected = task_of(name, split, data, tmp_path), data["conversations"]
    assert_same(
        (number, {key: value for key, value in talk.items() if key in theirs}, theirs)
        for number, (talk, theirs) in enumerate(zip(everything(task), expected, strict=True))
    )
    assert section == "smoltalk" or task.rows.order == data["permutation"]
    assert section == "smoltalk" or task.kind == data["eval_type"]


@each_file
def test_numbers_and_verdicts_of_gsm8k(values, tmp_path):
    data, pairs = values.json["gsm8k"], []
    task = task_of("gsm8k", "train", data, tmp_path)
    for number, talk in enumerate(everything(task)):
        answer = str(talk["messages"][-1]["content"][-1]["text"])
        pairs.append((number, nanochat_number(answer), data["references"][number]))
    for case in data["evaluate"]:
        talk, response, right = task[case["index"]], case["response"], data["references"][case["index"]]
        number = nanochat_number(response)
        ours = bool(number) and bool(right) and number.rstrip(".") == right.rstrip(".") != ""
        got = number, is_right_by_nanochat(talk, response), task.evaluate(talk, response), task.reward(talk, response)
        pairs.append((response, got, (case["extracted"], case["correct"], ours, float(ours))))
    assert_same(pairs)


@each_file
@pytest.mark.parametrize(("section", "name"), [("mmlu", "mmlu"), ("arc", "arc_easy")])
def test_verdicts_on_choices(values, section, name, tmp_path):
    data = values.json[section]
    task = task_of(name, "test", data, tmp_path)
    assert_same(
        (case, task.evaluate(task[case["index"]], case["response"]), case["correct"]) for case in data["evaluate"]
    )


@each_file
def test_texts_of_choices_files_and_programs(values, tmp_path):
    cases = values.json["render_mc"]
    assert_same((case, render_mc(case["question"], case["letters"], case["choices"]), case["text"]) for case in cases)
    data, path = values.json["customjson"], tmp_path / "lines.jsonl"
    path.write_text("\n".join(data["lines"]) + "\n", encoding="utf-8")
    assert list(read_conversations(path, ends_answered=False)) == data["conversations"]
    data = values.json["humaneval"]
    assert_same((case, extract_program(case["completion"]), case["program"]) for case in data["extract_program"])
    assert_same((case, extract_imports(case["prompt"]), case["imports"]) for case in data["extract_imports"])


@each_file
def test_order_of_a_mixture(values):
    data = values.json["mixture"]
    listed = [f"{chr(ord('a') + task)}{i}" for task, size in enumerate(data["lengths"]) for i in range(size)]
    mixed = [listed[place] for place in shuffled_places(len(listed), data["shuffle_seed"])]
    cut = data["sliced"]
    assert (listed, mixed) == (data["sequence_order"], data["order"])
    assert mixed[cut["start"] : cut["stop"] : cut["step"]] == cut["order"]


def draws(question: str, talk: dict[str, Any]) -> list[bool]:
    """Return the draws that a question shows: quotes of word and letter, and a question mark."""
    call = next(part["text"] for part in talk["messages"][1]["content"] if part["type"] == "python")
    quoted = [f"{quote}{text}{quote}" for text in call.split("'")[1:4:2] for quote in ("'", '"')]
    return [*(text in question for text in quoted), question.endswith("?")]


@each_file
def test_spelling(values, tmp_path):
    """Questions have our wording, except where nanochat's values contain it: else their draws are compared."""
    data, path = values.json["spellingbee"], tmp_path / "words.txt"
    path.write_text("\n".join(data["words"]) + "\n", encoding="utf-8")
    names = {"train": "spelling_bee", "test": "spelling_bee", "simple_train": "simple_spelling",
             "simple_test": "simple_spelling"}  # fmt: skip
    for key, name in names.items():
        split, size = key.removeprefix("simple_"), len(data[key])
        task = load_task(name, split, size=size, path=path, nanochat_seeds=True)
        for talk, expected in zip(everything(task), data[key], strict=True):
            ours, theirs = talk["messages"][0]["content"], expected["messages"][0]["content"]
            assert talk["messages"][1:] == expected["messages"][1:]
            assert ours == theirs or draws(ours, talk) == draws(theirs, talk)
    bee = load_task("spelling_bee", "train", size=1 + max(case["index"] for case in data["evaluate"]), path=path)
    for case in data["evaluate"]:
        talk, response = bee[case["index"]], case["response"]
        assert (bee.evaluate(talk, response), bee.reward(talk, response)) == (case["correct"], case["reward"])


# The tokenizer and conversations


# nanochat cuts a conversation, and a prompt too, after this many tokens. Ours keeps the end of a prompt.
LIMIT = 2048

each_tokenizer = of_files("tokenizer_*.json")
each_conversations = of_files("conversation_*.json")


@each_tokenizer
def test_trained_tokenizer(values):
    data = values.json
    documents = [text[: data["doc_cap_chars"]] for text in data["documents"][: data["num_documents_used"]]]
    assert sum(map(len, documents)) == data["chars_used"]
    trained = train_tokenizer(documents, data["vocab_size"])
    assert data["split_pattern"] == SPLIT_PATTERN
    assert {token: rank for rank, token in enumerate(trained.ranks)} == values.tokenizer.ranks
    assert trained.vocab_size == data["vocab_size"]
    assert_same((name, trained.special_ids.get(name), id_) for name, id_ in data["special_tokens"].items())
    assert trained.token_bytes.tolist() == data["token_bytes"]


@each_tokenizer
def test_encoding_and_decoding(values):
    data, tokenizer = values.json, values.tokenizer
    assert_same((case["text"], tokenizer.encode(case["text"]), case["ids"]) for case in data["encode"])
    decoded = [*data["encode"], *data["decode"]]
    assert_same((case["ids"], tokenizer.decode(case["ids"]), case.get("decoded", case["text"])) for case in decoded)
    documents = [
        case for case in data["encode_prepend_append"] if (case["prepend"], case["append"]) == ("<|bos|>", None)
    ]
    got = tokenizer.encode_documents([case["text"] for case in documents])
    assert_same((case["text"], ids.tolist(), case["ids"]) for case, ids in zip(documents, got, strict=True))


@each_tokenizer
def test_merges_of_small_corpora(values):
    """They have ties, or run out of pairs, where nanochat makes a smaller vocabulary and ours refuses."""
    for case in values.json["training_cases"]:
        if case["resulting_vocab_size"] < case["vocab_size"]:
            with pytest.raises(DataError, match=f"only {case['resulting_vocab_size']} tokens"):
                train_tokenizer(case["documents"], case["vocab_size"])
        trained = train_tokenizer(case["documents"], case["resulting_vocab_size"])
        learned = [token for token, rank in sorted(trained.ranks.items(), key=lambda each: each[1]) if rank >= 256]
        assert learned == [base64.b64decode(token) for token in case["learned_base64"]]
        assert trained.bos == case["first_special_id"]


@each_conversations
def test_ids_and_masks_of_conversations(values):
    for case in values.json["cases"]:
        most = LIMIT if case["max_tokens"] is None else case["max_tokens"]
        ids, mask = render_conversation(values.tokenizer, case["conversation"], most)
        assert (ids, mask) == (case["ids"], case["mask"]), case["name"]


@each_conversations
def test_prompts(values):
    """Of long ones, the part that nanochat keeps."""
    start = values.tokenizer.special_ids["<|assistant_start|>"]
    cases = [case for case in values.json["cases"] if case.get("completion_ids") is not None]
    got = [render_for_completion(values.tokenizer, case["conversation"]) for case in cases]
    assert_same(
        (case["name"], ids if len(ids) <= LIMIT else [*ids[:LIMIT], start], case["completion_ids"])
        for case, ids in zip(cases, got, strict=True)
    )
