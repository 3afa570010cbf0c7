"""Files of pairs: the forms that datasets have, and faults line by line."""

import json
from typing import Any

import pytest

from mlxchat.errors import DataError
from mlxchat.tasks import load_task
from mlxchat.tasks.pairs import parse_pair

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no"}, [USER]),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER]),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, [USER]),
        ({"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 8.5}, [USER]),
        ({"messages": [USER, YES, USER], "chosen": "yes", "rejected": "no"}, [USER, YES, USER]),
        ({"system": "Be brief.", "question": "Hi", "chosen": "yes", "rejected": "no"}, [SYSTEM, USER]),
        ({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, [SYSTEM, USER]),
    ],
)
def test_common_forms_give_messages_and_the_rejected_answer(line, before):
    assert parse_pair(line) == {"messages": [*before, YES], "rejected": "no"}


FAULTS: list[tuple[Any, str]] = [
    ({"prompt": "Hi", "chosen": "yes"}, "no rejected"),
    ({"chosen": "yes", "rejected": "no"}, "no question before chosen"),
    ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "no question before chosen"),
    ({"prompt": "Hi", "chosen": "yes", "rejected": ""}, "rejected: content of the assistant message is empty"),
    ({"prompt": "Hi", "chosen": "yes", "rejected": "yes"}, "chosen and rejected are the same"),
    ({"chosen": [USER, YES], "rejected": [{**USER, "content": "Ho"}, NO]}, "differ before their last message"),
    ({"chosen": [USER], "rejected": [USER, NO]}, "chosen: 1 messages, expected a user and an assistant message"),
    ({"prompt": [YES], "chosen": "yes", "rejected": "no"}, 'chosen: message 1 is from "assistant", expected "user"'),
    ({"prompt": "Hi", "chosen": {"text": "yes"}, "rejected": "no"}, "content of the assistant message is not text"),
    (["Hi", "yes", "no"], "not an object"),
]


def test_all_faults_of_a_file_are_named_with_their_lines(tmp_path):
    lines = [{"prompt": "Hi", "chosen": "yes", "rejected": "no"}, *(line for line, _ in FAULTS)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\nnot JSON\n")
    with pytest.raises(DataError) as caught:
        load_task("pairs", "train", path=path)
    said = str(caught.value)
    assert f"{len(FAULTS) + 1} lines that are not pairs" in said
    for number, (_, fault) in enumerate(FAULTS, start=2):
        (line,) = (line for line in said.splitlines() if line.startswith(f"  line {number}: "))
        assert fault in line
    assert "line 12: not JSON" in said


def test_splits_share_no_prompt_and_evaluate_by_the_chosen_answer(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"Hi {n // 2}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(200)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train, test = (load_task("pairs", split, path=path) for split in ("train", "test"))
    prompts = [{task[n]["messages"][0]["content"] for n in range(len(task))} for task in (train, test)]
    assert not prompts[0] & prompts[1]
    assert (len(train) + len(test), prompts[1] != set()) == (200, True)
    assert train.evaluate(train[0], train[0]["messages"][-1]["content"])
    assert not train.evaluate(train[0], train[0]["rejected"])
