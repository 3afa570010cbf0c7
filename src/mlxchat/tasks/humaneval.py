"""HumanEval: write a Python function from its docstring; programs are run by their tests.

Counterpart of nanochat's tasks/humaneval.py. The sandbox runs programs and decides what counts as passing.
"""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

from mlxchat.tasks.base import Conversation, dialogue
from mlxchat.tasks.downloads import HubTask

_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
_KEPT_CHARS = 1000
_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(HubTask):
    """164 functions; right where the program made of the response passes the function's tests."""

    name = "humaneval"
    repository: ClassVar[str] = "openai/openai_humaneval"
    splits = ("test",)
    training_splits = ()
    subsets: ClassVar[tuple[str, ...]] = ("openai_humaneval",)
    columns = texts = ("prompt", "canonical_solution", "entry_point", "test")

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return dialogue(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Run the program that the response makes, isolated, and say whether its tests passed."""
        return self.explain(conversation, response)[0]

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, and how the program ended and what it printed last."""
        from mlxchat.sandbox.programs import run_program  # only those who execute need it

        outcome = run_program(assemble_program(conversation, response))
        printed = _ADDRESS.sub("0x…", outcome.output[-_KEPT_CHARS:])  # another one each time
        return bool(outcome.passed), {"status": outcome.status, "printed": printed}


def extract_program(response: str) -> str:
    """Return the first fenced block of a response (```python or ```), or all of it, without spaces around."""
    found = _BLOCK.search(response)
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
