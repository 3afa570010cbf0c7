"""core_*.json and tasks_*.json: the scores of chat tasks, by letters' logits, ChatCORE and executed programs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from comparison import Comparison, Quantity, largest, same, scaled_distance
from parity_file import ParityFile

from kit.training import make_context
from mlxchat.data.conversation import render_for_completion
from mlxchat.engine.generate import Engine
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.language_model import LanguageModel
from mlxchat.evals.scores import CHATCORE_SETS, Score, chatcore
from mlxchat.sandbox.programs import run_program
from mlxchat.tasks.base import Task
from mlxchat.tasks.benchmarks import assemble_program

LOGITS = 1e-4
_BATCH_TOKENS = 1000  # several batches for each task
_NAMES = {
    "ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "MMLU": "mmlu", "GSM8K": "gsm8k",
    "HumanEval": "humaneval", "SpellingBee": "spelling_bee",
}  # fmt: skip
# nanochat counts a program that exits before its tests as passed. Ours must run to its end.
_LEAVES = ("sys.exit(0)", "raise SystemExit", "os._exit(0)")
# nanochat sets such functions to None, so that a call fails. Ours forbids what they would do, with another message.
_DISABLED = ("os.system", "subprocess", "os.kill", "shutil.rmtree")


class _Conversations:
    """Conversations of a file as a task; the last message of each holds the right letter."""

    kind, chance = "categorical", 0.25

    def __init__(self, conversations: list[dict[str, Any]]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.conversations[index]

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return bool(response == conversation["messages"][-1]["content"])


def letters(file: ParityFile) -> Iterator[Comparison]:
    """Compare the logits of the letters after each question, the answers, and the accuracy."""
    if "chat_categorical" not in file.json:
        return
    tokenizer, tasks = file.tokenizer(), file.companion("tasks", ".json").json
    for variant, groups in file.json["chat_categorical"].items():
        model = LanguageModel(Engine(file.core_model(variant), tokenizer), batch_tokens=_BATCH_TOKENS)
        for group in groups:
            name, task = f"{variant} {group['task']}", _Conversations(tasks[group["task"]]["conversations"])
            yield same(f"{name}: prompt lengths", [
                (str(row["index"]), len(render_for_completion(tokenizer, task[row["index"]])), row["prompt_length"])
                for row in group["results"]
            ])  # fmt: skip
            # Beyond the context nanochat reads the whole prompt, and ours keeps its end.
            results = [row for row in group["results"] if row["prompt_length"] <= model.context_tokens]
            prompts = [render_for_completion(tokenizer, task[row["index"]]) for row in results]
            logits = model.letter_logits(prompts, [row["letters"] for row in results])
            yield largest(f"{name}: letters' logits", {
                str(row["index"]): scaled_distance(found, row["letter_logits"])
                for row, found in zip(results, logits, strict=True)
            }, LOGITS)  # fmt: skip
            how = Answering(batch_rows=8, max_new_tokens=1)
            with tempfile.TemporaryDirectory() as folder:
                ctx = make_context(Path(folder))
                score, examples = evaluate_task(ctx, model, cast(Task, task), how, name=name, work=ctx.work)
            answers = {example["index"]: (example["output"], example["verdict"]) for example in examples}
            yield same(f"{name}: answers", [
                (str(row["index"]), answers[row["index"]], (row["predicted"], bool(row["correct"]))) for row in results
            ])  # fmt: skip
            if len(results) == len(group["results"]) == len(task):
                yield same(f"{name}: accuracy", [("", round(score.accuracy, 9), round(group["accuracy"], 9))])


def metric(file: ParityFile) -> Iterator[Comparison]:
    """Compare the ChatCORE of given accuracies."""
    if "chatcore" not in file.json:
        return
    for variant, cases in file.json["chatcore"].items():
        differences = {}
        for number, case in enumerate(cases):
            scores = {
                _NAMES[name]: Score(kind="", accuracy=value, chance=case["baselines"][name], num_examples=1)
                for name, value in case["results"].items()
            }
            found = chatcore(scores, {name: name for name in scores})
            of_set = found is not None and found["set"] == variant and set(scores) == set(CHATCORE_SETS[variant])
            value = found["value"] if found is not None and of_set else float("nan")
            differences[str(number)] = abs(value - case["chatcore"])
        yield largest(f"{variant}: ChatCORE", differences, 1e-9)


def executions(file: ParityFile) -> Iterator[Comparison]:
    """Compare the verdicts on executed programs by our rule, and what programs print."""
    if file.path.suffix != ".json" or not (data := file.json.get("humaneval")):
        return
    cases = [case for case in data["evaluate"] if not any(word in case["completion"] for word in _DISABLED)]
    programs = [assemble_program(data["conversations"][case["index"]], case["completion"]) for case in cases]
    expected = [case["success"] and not any(word in case["completion"] for word in _LEAVES) for case in cases]
    outcomes = [run_program(program) for program in programs]
    yield same("humaneval: verdicts of programs, by our rule", [
        (case["name"], outcome.passed, bool(verdict))
        for case, outcome, verdict in zip(cases, outcomes, expected, strict=True)
    ])  # fmt: skip
    printing = data["execute_code"]
    found = zip(printing, [run_program(case["code"]) for case in printing], strict=True)
    yield same("humaneval: what programs print, and their errors", [
        (
            case["code"],
            (outcome.passed, outcome.output[: len(case["stdout"])], (case["error"] or "") in outcome.output),
            (case["success"], case["stdout"], True),
        )
        for case, outcome in found
    ])  # fmt: skip


CORE: tuple[Quantity, ...] = (letters, metric)
TASKS: tuple[Quantity, ...] = (executions,)
