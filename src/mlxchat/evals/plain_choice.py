"""Multiple choice for models that cannot chat: the option with the lowest mean loss after the question as plain text.

The prompt is that of ARC in CORE without shots: "Question: …", and on the next line "Answer: " and the option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxchat.config.schema import TaskItem
from mlxchat.data.mixture import open_item
from mlxchat.errors import ConfigError
from mlxchat.evals.core import answer_examples
from mlxchat.evals.core_bundle import CoreTask
from mlxchat.evals.core_journal import Journal
from mlxchat.evals.core_questions import TextEncoder
from mlxchat.evals.language_model import LanguageModel
from mlxchat.evals.scores import Score
from mlxchat.runner.context import Context
from mlxchat.tasks.base import Task

_KIND = "multiple_choice"


def measure_plain_choice(
    ctx: Context, model: LanguageModel, tokenizer: TextEncoder, *, batch_tokens: int, examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a model's scores on `eval.base_tasks` by name as data of scores.json; accuracies become metrics.

    Args:
        ctx: of a stage that declares `eval`.
        model: to evaluate.
        tokenizer: the model's.
        batch_tokens: tokens per forward pass.
        examples: gets a row for every question.

    Raises:
        ConfigError: a task is not multiple choice, or does not name its options.
        Interrupted: the run was asked to stop; the next attempt continues.
    """
    items: Mapping[str, TaskItem] = ctx.config.eval.base_tasks
    tasks, scores = {name: open_item(ctx, item) for name, item in sorted(items.items())}, {}
    asked = {name: _questions(name, task) for name, task in tasks.items()}
    for name, questions in asked.items():
        task = CoreTask(
            label=name, kind=_KIND, data="", num_fewshot=0, delimiter="\nAnswer: ", baseline=tasks[name].chance
        )
        journal = Journal(ctx.work / "plain" / f"{name}.jsonl", {"questions": len(questions)})
        with ctx.progress(len(questions), f"questions of {name}") as progress:
            progress.update(len(journal.records))
            limit = None if model.extends else model.context_tokens
            for results in answer_examples(
                model, tokenizer, task, questions, batch_tokens, journal.records, limit=limit
            ):
                journal.append(results)
                progress.update(len(journal.records))
                if ctx.should_stop():
                    raise ctx.stop(f"question {len(journal.records)} of {name}")
        records = [journal.records[index] for index in range(len(questions))]
        examples += [{"task": name, **record} for record in records]
        cropped = sum(record["details"]["cropped"] for record in records)
        scores[name] = Score.of_examples([records], kind=_KIND, chance=task.baseline, cropped=cropped)
        ctx.metrics[name] = scores[name].accuracy
    return {name: score.to_dict() for name, score in scores.items()}


def _questions(name: str, task: Task) -> list[dict[str, Any]]:
    found = [task[index] for index in range(len(task))]
    if any("choices" not in each for each in found):
        raise ConfigError(f"eval.base_tasks.{name}: a base model needs options to choose from, and this task has none")
    return [
        {
            "query": f"Question: {each['question']}", "choices": each["choices"],
            "gold": each["letters"].index(each["answer"]),
        }
        for each in found
    ]  # fmt: skip
