"""mlxchat show ID --examples of RL: a question, and the answers that were sampled to it, the best rewarded first."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mlxchat.commands.show_examples import wrapped
from mlxchat.errors import ConfigError, visible
from mlxchat.evals.examples import read_rollouts

_WIDEST = 110


def show_rollouts(folder: Path, *, which: str, count: int, iteration: int | None) -> int:
    """Print some of RL's questions with their answers and return the exit code.

    Args:
        folder: of the artifact, which holds rollouts.
        which: wrong, right or all answers; questions that have none of them are left out.
        count: questions at most.
        iteration: whose; None: the last one's, and those before it where it has fewer.

    Raises:
        ConfigError: nothing was kept of that iteration.
        DataError: the answers cannot be read.
    """
    answers = read_rollouts(folder)
    kept = sorted({answer["iteration"] for answer in answers})
    if iteration is not None and iteration not in kept:
        told = f"answers of {len(kept)} are kept, {kept[0]} to {kept[-1]}" if kept else "no answers are kept"
        raise ConfigError(f"{folder.name} holds no answers of iteration {iteration}: {told}")
    questions = [
        list(group) for _, group in groupby(answers, key=lambda answer: (answer["iteration"], answer["question"]))
    ]
    width, colour = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns), sys.stdout.isatty()
    shown = 0
    for question in questions:
        wanted = [answer for answer in question if which == "all" or answer["right"] == (which == "right")]
        if shown < count and wanted and iteration in (None, question[0]["iteration"]):
            shown += 1
            print("\n".join(_describe(question, wanted, width, colour=colour)), end="\n\n")
    for each in kept if iteration is None else [iteration]:
        if each in (kept[0], kept[-1], iteration):
            own = [answer for answer in answers if answer["iteration"] == each]
            print(f"iteration {each}: {sum(answer['right'] for answer in own)} of {len(own)} kept answers right")
    if not shown:
        print(f"no {'' if which == 'all' else which + ' '}answers")
    elif iteration is None and len(kept) > 1:
        print(f"answers of {len(kept)} iterations are kept, {kept[0]} to {kept[-1]}: --iteration N shows one")
    return 0


def _describe(
    question: list[dict[str, Any]], wanted: list[dict[str, Any]], width: int, *, colour: bool
) -> Iterator[str]:
    first = question[0]
    right = sum(answer["right"] for answer in question)
    mean = sum(answer["reward"] for answer in question) / len(question)
    head = f"iteration {first['iteration']}, question {first['question']}: {right} of {len(question)} right, "
    head = visible(f"{head}mean reward {mean:.3g}")
    yield f"\033[1m{head}\033[0m" if colour else head
    yield from wrapped("asked", first["prompt"], width)
    yield from wrapped("expected", first["expected"], width)
    for answer in sorted(wanted, key=lambda each: (-each["reward"], each["sample"])):
        verdict = "right" if answer["right"] else "wrong"
        parts = "".join(f"  {name} {value:.3g}" for name, value in answer["parts"].items())
        cut = "" if answer["finished"] else "  cut"
        line = f"  {verdict}  reward {answer['reward']:.3g}{parts}  advantage {answer['advantage']:+.3f}  "
        line = visible(f"{line}{answer['tokens']} tokens{cut}")
        yield f"\033[{32 if answer['right'] else 31}m{line}\033[0m" if colour else line
        yield from wrapped("", answer["output"], width)
