"""The data sets of the Hub that nanochat trains on and evaluates with. Counterparts of its tasks/*.py.

To add one: a class here with its home, subsets, splits and columns, and a line in `tasks/__init__.py`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from mlxchat.errors import ConfigError, DataError, StepFailed
from mlxchat.tasks.answers import Conversation, calculator_parts, final_number, is_right_by_nanochat
from mlxchat.tasks.base import LETTERS, choice_dialogue, dialogue, find_fault
from mlxchat.tasks.downloads import HubTask


class SmolTalk(HubTask):
    """General conversations of one turn or more, 460 thousand of them in train, some with a system message.

    A verdict compares with the data's own answer, which few good answers equal: SmolTalk is for training.
    """

    name = "smoltalk"
    home = "HuggingFaceTB/smol-smoltalk"
    subsets = ("data",)
    columns = may_be_null = ("messages",)  # find_fault says better what is missing

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        messages = self.row(index)["messages"]
        if fault := find_fault(messages):
            raise DataError(f"{self.place(index)} is no conversation: {fault}")
        return {"messages": messages}


class MMLU(HubTask):
    """Questions over 57 subjects with four choices; the answer is a letter.

    The split auxiliary_train, questions of other data sets to train on, is on the Hub twice: in subset `all`, and
    in a subset of its own with each row inside a column `train`. Both are read.
    """

    name = "mmlu"
    kind = "categorical"
    chance = 1 / len(LETTERS)
    home = "cais/mmlu"
    splits = ("auxiliary_train", "test", "validation", "dev")
    training_splits = ("auxiliary_train",)
    subsets = ("all", "auxiliary_train")
    columns = ("question", "subject", "choices", "answer")
    texts = ("question",)
    may_be_null = ("subject",)
    nested = "train"

    def pattern(self) -> str:
        """Return the shell pattern of the files; the subset auxiliary_train has no other split."""
        if self.subset == "all":
            return super().pattern()
        if self.split != self.subset:
            raise ConfigError(f"subset {self.subset} of task mmlu has only the split {self.subset}, not {self.split}.")
        return f"{self.subset}/train-*.parquet"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        if len(row["choices"]) != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
            raise DataError(f"{self.place(index)} has {len(row['choices'])} choices and answer {row['answer']}, not 4")
        letter = LETTERS[row["answer"]]
        return choice_dialogue(row["question"], LETTERS, row["choices"], letter, subject=row["subject"])


class ArcEasy(HubTask):
    """Science questions of school tests with three to five choices, labelled as in the data: A, B, ... or 1, 2, ..."""

    name = "arc_easy"
    kind = "categorical"
    chance = 0.25
    home = "allenai/ai2_arc"
    splits = ("train", "validation", "test")
    subsets = ("ARC-Easy",)
    columns = ("question", "choices", "answerKey")
    texts = ("question", "answerKey")

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        letters, answer = row["choices"]["label"], row["answerKey"]
        if answer not in letters:
            raise DataError(f'{self.place(index)} has the answer "{answer}", which is none of {", ".join(letters)}')
        if len(letters) != len(row["choices"]["text"]):
            raise DataError(f"{self.place(index)} has {len(letters)} labels for {len(row['choices']['text'])} choices")
        return choice_dialogue(row["question"], letters, row["choices"]["text"], answer)


class ArcChallenge(ArcEasy):
    """The questions that simple methods of 2018 got wrong."""

    name = "arc_challenge"
    subsets = ("ARC-Challenge",)


@dataclass(eq=False, kw_only=True)
class GSM8K(HubTask):
    """Grade-school word problems whose answers call the calculator; right by the number after the first ####.

    Conversations are nanochat's. Verdicts differ in two cases: a response without a number after #### is always wrong,
    and a full stop after the number is not part of it.
    """

    name = "gsm8k"
    home = "openai/gsm8k"
    subsets = ("main", "socratic")
    columns = texts = ("question", "answer")
    prompt_tokens = 320
    nanochat_verdict: bool = False
    """Whether scores and rewards are nanochat's verdicts. Evaluations record these in either case."""

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        return dialogue(row["question"], calculator_parts(row["answer"], keep_empty=True))

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare the number after the first ####. By our verdict a response without one is wrong."""
        if self.nanochat_verdict:
            return is_right_by_nanochat(conversation, response)
        number = final_number(str(conversation["messages"][-1]["content"][-1]["text"]))
        return number is not None and number == final_number(response)

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, and nanochat's, which published scores use."""
        verdict = self.evaluate(conversation, response)
        return verdict, {"nanochat_verdict": is_right_by_nanochat(conversation, response)}


@dataclass(eq=False, kw_only=True)
class HumanEval(HubTask):
    """164 functions to write from their docstrings; right where the response's program passes the function's tests.

    The sandbox runs programs and decides what counts as passing; docs/internals/security.md says what it confines.
    """

    name = "humaneval"
    home = "openai/openai_humaneval"
    splits = ("test",)
    training_splits = ()
    subsets = ("openai_humaneval",)
    columns = texts = ("prompt", "canonical_solution", "entry_point", "test")
    unconfined: bool = False
    """Whether programs also run where the system cannot keep them from the user's files, processes and network."""

    def check(self) -> None:
        """Check that this machine can confine programs."""
        from mlxchat.sandbox.programs import find_confinement_problem  # only those who execute need it

        if not self.unconfined and (problem := find_confinement_problem()):
            raise StepFailed(
                f"task humaneval: {problem}. Leave the task out, or accept the risk with options: {{unconfined: 1}}"
            )

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return dialogue(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Run the program that the response makes, isolated, and return whether its tests passed."""
        return self.explain(conversation, response)[0]

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, and how the program ended and the last 1,000 characters that it printed."""
        from mlxchat.sandbox.programs import run_program

        self.check()
        outcome = run_program(assemble_program(conversation, response))
        printed = re.sub(r"0x[0-9a-f]{6,}", "0x…", outcome.output[-1000:])  # addresses differ each time
        return bool(outcome.passed), {"status": outcome.status, "printed": printed}


def extract_program(response: str) -> str:
    """Return the first fenced block of a response (```python or ```), or all of it, without spaces around."""
    found = re.search(r"```(?:python)?\s*\n(.*?)\n```", response, re.DOTALL)
    return (found[1] if found else response).strip()


def extract_imports(prompt: str) -> str:
    """Return the import lines at the beginning of a prompt, up to its first line of other code."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def assemble_program(conversation: Conversation, response: str) -> str:
    """Return the program that decides on a response: the prompt's imports, the response's code, tests, their call."""
    imports = extract_imports(conversation["messages"][0]["content"])
    call = f"check({conversation['entry_point']})"
    return f"{imports}\n\n{extract_program(response)}\n\n{conversation['test']}\n{call}"
