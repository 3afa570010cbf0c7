"""The data sets of the Hub that nanochat trains on and evaluates with. Counterparts of its tasks/*.py.

To add one: a class here with its repository, subsets, splits and columns, and an entry in `tasks/__init__.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mlxchat.errors import ConfigError, StepFailed
from mlxchat.tasks.answers import Conversation, calculator_parts, final_number, is_right_by_nanochat
from mlxchat.tasks.base import LETTERS, choice_dialogue, dialogue
from mlxchat.tasks.downloads import HubTask


class SmolTalk(HubTask):
    """460 thousand general conversations to train on, some with a system message; verdicts require the exact answer."""

    name = "smoltalk"
    home = "HuggingFaceTB/smol-smoltalk"
    subsets = ("data",)
    columns = ("messages",)

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        return {"messages": row["messages"]}


class MMLU(HubTask):
    """Questions of 57 subjects with four choices; the answer is a letter. Both subsets have a split auxiliary_train."""

    name = "mmlu"
    kind = "categorical"
    chance = 1 / len(LETTERS)
    home = "cais/mmlu"
    splits = ("auxiliary_train", "test", "validation", "dev")
    training_splits = ("auxiliary_train",)
    subsets = ("all", "auxiliary_train")
    columns = ("question", "subject", "choices", "answer")

    def pattern(self) -> str:
        """Return the shell pattern of the split's files; the subset auxiliary_train has only its own split."""
        if self.subset == "all":
            return super().pattern()
        if self.split != self.subset:
            raise ConfigError(f"subset {self.subset} of task mmlu has only the split {self.subset}, not {self.split}.")
        return f"{self.subset}/train-*.parquet"

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        letter = dict(enumerate(LETTERS)).get(row["answer"], str(row["answer"]))
        return choice_dialogue(row["question"], LETTERS, row["choices"], letter, subject=row["subject"])


class ArcEasy(HubTask):
    """Science questions of school tests with three to five choices, labelled A, B, ... or 1, 2, ..."""

    name = "arc_easy"
    kind = "categorical"
    chance = 0.25
    home = "allenai/ai2_arc"
    splits = ("train", "validation", "test")
    subsets = ("ARC-Easy",)
    columns = ("question", "choices", "answerKey")

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        choices = row["choices"]
        return choice_dialogue(row["question"], choices["label"], choices["text"], row["answerKey"])


class ArcChallenge(ArcEasy):
    """Questions that retrieval and word co-occurrence methods of 2018 answered wrong."""

    name = "arc_challenge"
    subsets = ("ARC-Challenge",)


@dataclass(eq=False, kw_only=True)
class GSM8K(HubTask):
    """Grade-school word problems whose answers call the calculator, judged by the number after the first ####.

    Conversations are nanochat's. Verdicts differ in two cases: a response without a number after #### is always wrong,
    and a full stop after the number is ignored. Evaluations record nanochat's, too.
    """

    name = "gsm8k"
    home = "openai/gsm8k"
    subsets = ("main", "socratic")
    columns = ("question", "answer")
    prompt_tokens = 320

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        return dialogue(row["question"], calculator_parts(row["answer"], keep_empty=True))

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the number after the first #### is right; a response without one is wrong."""
        number = final_number(str(conversation["messages"][-1]["content"][-1]["text"]))
        return number is not None and number == final_number(response)

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict and nanochat's, on which published scores are based."""
        verdict = self.evaluate(conversation, response)
        return verdict, {"nanochat_verdict": is_right_by_nanochat(conversation, response)}


@dataclass(eq=False, kw_only=True)
class HumanEval(HubTask):
    """164 functions to write from docstrings, judged by their tests in the sandbox (docs/internals/security.md)."""

    name = "humaneval"
    home = "openai/openai_humaneval"
    splits = ("test",)
    training_splits = ()
    subsets = ("openai_humaneval",)
    columns = ("prompt", "canonical_solution", "entry_point", "test")
    unconfined: bool = False
    """Run programs even if the system cannot isolate them from the user's files, processes and network."""

    def check(self) -> None:
        """Check that this machine can confine programs."""
        from mlxchat.sandbox.programs import find_confinement_problem  # imported only for evaluations

        if not self.unconfined and (problem := find_confinement_problem()):
            raise StepFailed(
                f"task humaneval: {problem}. Leave the task out, or accept the risk with options: {{unconfined: 1}}"
            )

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return dialogue(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Run the response's program in the sandbox and return True if its tests passed."""
        return self.explain(conversation, response)[0]

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, the program's status, and the last 1,000 characters of its output."""
        from mlxchat.sandbox.programs import run_program

        self.check()
        outcome = run_program(assemble_program(conversation, response))
        printed = re.sub(r"0x[0-9a-f]{6,}", "0x…", outcome.output[-1000:])  # addresses are not reproducible
        return bool(outcome.passed), {"status": outcome.status, "printed": printed}


def extract_program(response: str) -> str:
    """Return the first fenced block (```python or ```) of a response, or all of it, stripped."""
    found = re.search(r"```(?:python)?\s*\n(.*?)\n```", response, re.DOTALL)
    return (found[1] if found else response).strip()


def extract_imports(prompt: str) -> str:
    """Return the import lines of a prompt before its first other line of code."""
    lines = [line for line in map(str.strip, prompt.split("\n")) if line and not line.startswith("#")]
    return "\n".join(takewhile(lambda line: line.startswith(("import ", "from ")), lines))


def assemble_program(conversation: Conversation, response: str) -> str:
    """Return the program that tests a response: the prompt's imports, the response's code, the tests and their call."""
    imports = extract_imports(conversation["messages"][0]["content"])
    call = f"check({conversation['entry_point']})"
    return f"{imports}\n\n{extract_program(response)}\n\n{conversation['test']}\n{call}"
