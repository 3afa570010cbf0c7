"""mlxchat eval: evaluate any model on a task, a suite, CORE or held-out text."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from mlxchat.commands.arguments import Parser, positive, quoted
from mlxchat.commands.output import print_json
from mlxchat.config.table import Table
from mlxchat.errors import ConfigError
from mlxchat.store.catalog import check_model
from mlxchat.store.naming import describe_model, find_model
from mlxchat.store.store import Store
from mlxchat.tasks import task_class, task_names

_THIRD_PARTY = "hf:"
_BASE_TASKS = ("core", "bpb")
_ABOUT = """MODEL: as ID, or hf:FOLDER, hf:ORGANISATION/NAME (a model that mlx-lm opens); without it, the latest run's

examples
  mlxchat eval sft --task gsm8k --limit 100 --samples 8     pass rate, any of 8, and both by nanochat's verdict
  mlxchat eval import:d32 --suite chatcore                  nanochat's ChatCORE
  mlxchat eval pretrain --task core --task bpb              a base model; settings such as corpus=climbmix follow
  mlxchat eval hf:FOLDER --text book.txt                    bits per byte and perplexity of any text"""


def evaluate(parser: Parser) -> None:
    """Declare `mlxchat eval`."""
    parser.take_settings()
    parser.take_names("[MODEL]", least=0, about=_ABOUT)
    parser.use("(--task TASK | --suite SUITE | --text PATH) [SETTINGS]")
    parser.description = "Measure a model. The evaluation is a step like any other: cached, resumed, with a manifest."
    add = parser.add_argument
    add("--task", action="append", default=[], help="a task, such as gsm8k; core, bpb for base models; may be repeated")
    add("--text", metavar="PATH", help="bits per byte and perplexity of a file, or a folder of files")
    add("--suite", help="the tasks of conf/suite/SUITE.yaml, such as chatcore")
    add("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    samples = "answers to each question, at temperature 1 (default: 1)"
    add("--samples", type=positive, default=1, metavar="N", help=samples)
    parser.add_json()


def _evaluate(options: Namespace) -> int:
    """Run the evaluation unless it is done; print its scores."""
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.pipeline import plan_to_run, run_pipeline

    if not options.task and options.suite is None and options.text is None:
        known = ", ".join((*_BASE_TASKS, *task_names()))
        raise ConfigError(f"expected --task TASK ({known}), --suite SUITE or --text PATH")
    for name in options.task:
        if name not in _BASE_TASKS:
            task_class(name)  # raises an error with the nearest name
    given = split_options(options.settings)
    # Settings such as eval.core.tasks need the group.
    core = ["core=nanochat"] if "core" in options.task else []
    store = Store(Path(compose_config([*core, *given[0]], *given[1:]).config.outputs))
    reference = next(iter(options.names), None)
    settings = _third_party(options, reference) if reference and reference.startswith(_THIRD_PARTY) else None
    settings = settings or _ours(options, store, reference)
    composed = compose_config([*settings, *given[0]], *given[1:])
    plan = plan_to_run(composed.config, store)
    # Output of the run must not mix with the JSON.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        if not plan[-1].done:
            run_pipeline(composed, plan, is_verb=True)
            store.forget()
    place = store.find(plan[-1].rid)
    assert place is not None, "a run that ends has made it"
    scores = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    if options.json:
        print_json({"artifact": place.name, **scores})
        return 0
    for line in _describe(scores):
        print(line)
    print(f"\n{place}" + (": mlxchat show ID --examples wrong shows its answers" if scores["tasks"] else ""))
    return 0


def _ours(options: Namespace, store: Store, name: str | None) -> list[str]:
    """Return the settings to evaluate a model of the store."""
    found = find_model(store, name)
    check_model(found.place)
    print(f"model: {describe_model(store, found)}", file=sys.stderr)
    chats = json.loads((found.place / "checkpoint.json").read_text(encoding="utf-8"))["format"] == "chat"
    if not chats:
        _check_base(options, found.place.name)
    elif "core" in options.task:
        raise ConfigError(f"{found.place.name} is a chat model; CORE needs a base model; use --suite chatcore")
    node = f'stage: eval, checkpoint: "artifact:{found.place.name}"'
    return [*_pipeline(options, "eval", node), f"eval.seeds={options.samples}", *_suite(options, chats=chats)]


def _third_party(options: Namespace, reference: str) -> list[str]:
    """Return the settings to evaluate a third-party model."""
    from mlxchat.engine.third_party import load_tokenizer
    from mlxchat.interop.source import outside_folder

    folder = outside_folder(reference)
    name = reference.removeprefix(_THIRD_PARTY).rstrip("/").rpartition("/")[2]
    chats = options.suite is not None or load_tokenizer(folder)[0].has_chat_template
    if not chats:
        _check_base(options, name)
    chosen = [f"outside.path={quoted(str(folder))}", f"outside.name={quoted(name)}"]
    return [*_pipeline(options, "outside", "stage: outside"), *chosen, *_suite(options, chats=chats)]


def _check_base(options: Namespace, name: str) -> None:
    """Check that tasks are multiple choice."""
    asked = [task for task in options.task if task not in _BASE_TASKS]
    if options.suite or any(task_class(task).kind != "categorical" for task in asked):
        raise ConfigError(
            f"{name} is a base model, which cannot answer questions: expected --task core, --task bpb, or multiple "
            "choice such as --task mmlu, whose options are compared by their probabilities"
        )


def _pipeline(options: Namespace, step: str, node: str) -> list[str]:
    """Return the settings of a pipeline of one step, preceded by a corpus if text is measured."""
    corpus = "bpb" in options.task
    node = f"{{{node}, corpus: corpus}}" if corpus else f"{{{node}}}"
    first = ["~pipeline.outside"] if corpus else ["~pipeline.corpus", "~pipeline.outside"]
    return ["name=eval", "pipeline=outside", *first, f"+pipeline.{step}={node}"]


def _suite(options: Namespace, *, chats: bool) -> list[str]:
    """Return the settings that choose tasks, as a base model or one that chats is asked."""
    from mlxchat.composition.compose import compose_config

    chosen = ["core=nanochat" if "core" in options.task else "core=none", f"suite={options.suite or 'none'}"]
    if options.text is not None:
        chosen.append(f"eval.text={quoted(options.text)}")
    if "core" in options.task and options.limit is not None:
        chosen.append(f"eval.core.max_per_task={options.limit}")
    for task in options.task:
        if task in _BASE_TASKS:
            continue
        splits, name = task_class(task).splits, re.sub("[:.]", "_", task)
        split = "test" if "test" in splits else splits[0]
        place = f"suite.{name}" if chats else f"eval.base_tasks.{name}_base"
        stop = "" if chats or options.limit is None else f", stop: {options.limit}"
        chosen.append(f"+{place}={{task: {quoted(task)}, split: {split}{stop}}}")
    if options.limit is not None:
        chosen += [f"++suite.{name}.stop={options.limit}" for name in compose_config(chosen).config.suite]
    return chosen


def _describe(scores: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of scores."""
    if bpb := scores["bpb"]:
        yield f"bits per byte   {bpb['val']:.4f} over {bpb['tokens']:,} tokens"
    if text := scores.get("text"):
        yield f"bits per byte   {_with_error(text['bpb'], text['stderr'])} of {text['bytes']:,} bytes"
        yield f"perplexity      {_with_error(text['perplexity'], text['perplexity_stderr'])} per token"
    if core := scores["core"]:
        value = core.get("core")
        yield f"CORE            {'of some tasks' if value is None else _with_error(value, core.get('stderr'))}"
    tasks = scores["tasks"]
    if not tasks:
        return
    columns = {
        "right": "accuracy", "±": "stderr", "any": "any_right", "nanochat": "nanochat_accuracy",
        "nanochat any": "nanochat_any_right", "chance": "chance",
    }  # fmt: skip
    used = {title: key for title, key in columns.items() if any(each.get(key) is not None for each in tasks.values())}
    rows = []
    for name, each in tasks.items():
        shares = ["" if each.get(key) is None else f"{each[key]:.1%}" for key in used.values()]
        rows.append([name, *shares, f"{each['num_questions']:,}", str(each.get("seeds", 1))])
    header = ["task", *used, "questions", "samples"]
    yield Table(header=header, align="l" + "r" * (len(header) - 1), rows=rows).text()
    if chatcore := scores["chatcore"]:
        yield f"ChatCORE {chatcore['value']:.4f}, by nanochat's verdicts {chatcore['nanochat_value']:.4f}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
