"""mlxchat eval: any model on a task, a suite, CORE or held-out text; what `show` prints of answers and samples."""

import json
import re
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any

from mlxchat.commands.arguments import Parser, positive, print_json, quoted, show_value
from mlxchat.config.wording import Table
from mlxchat.errors import ConfigError, DataError, suggest, visible
from mlxchat.evals.examples import has_rollouts, read_examples, read_rollouts
from mlxchat.report.examples import verdict_of, with_calls
from mlxchat.store import locks
from mlxchat.store.catalog import check_model
from mlxchat.store.files import Records, list_folder
from mlxchat.store.naming import describe_model, find_model, resolve
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
    print("\n".join(_describe(scores)))
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
        accepted = "expected --task core, --task bpb, or multiple choice such as --task mmlu"
        raise ConfigError(f"{name} is a base model, which cannot answer questions: {accepted}")


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


_WIDEST = 110


def show_examples(folder: Path, options: Namespace) -> int:
    """Print examples of an evaluation's or RL's artifact, as the options of `mlxchat show` choose them."""
    if has_rollouts(folder):
        _show_rollouts(folder, which=options.examples, count=options.n, iteration=options.iteration)
    else:
        _show_answers(folder, which=options.examples, count=options.n, task=options.task)
    return 0


def _show_answers(folder: Path, *, which: str, count: int, task: str | None) -> None:
    """Print `count` examples, spread over the tasks, and how many of each task are right."""
    verdicts: dict[str, list[bool]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for example in read_examples(folder):
        name, is_right = example["task"], bool(example["verdict"])
        verdicts.setdefault(name, []).append(is_right)
        found = chosen.setdefault(name, [])
        if len(found) < count and which in ("all", "right" if is_right else "wrong"):
            found.append(example)
    if task is not None and task not in verdicts:
        known = ", ".join(verdicts) or "none"
        raise ConfigError(f'{folder.name} has no task "{task}", it has {known}.{suggest(task, verdicts)}')
    tasks = [task] if task is not None else [*verdicts]
    for name in tasks:
        for example in chosen[name][: -(-count // len(tasks))]:
            verdict = verdict_of(example["output"] or "", example["expected"] or "", is_right=example["verdict"])
            seed = "" if example["seed"] is None else f"  seed {example['seed']}"
            tokens = "" if example["tokens"] is None else f"  {example['tokens']} tokens"
            print(visible(f"{name} {example['index']}{seed}  {verdict}{tokens}"))
            for title in ("prompt", "output", "expected"):
                if example[title] is not None:
                    _print_wrapped(title, example[title])
            for key, value in example["details"].items():
                if value and key != "finished":
                    _print_wrapped(key, show_value(value))
            print()
    for name in tasks:
        print(f"{visible(name)}: {sum(verdicts[name])} of {len(verdicts[name])} right")


def _show_rollouts(folder: Path, *, which: str, count: int, iteration: int | None) -> None:
    """Print `count` questions of RL with their answers, best first; those of the last iteration come first."""
    answers = read_rollouts(folder)
    kept = sorted({answer["iteration"] for answer in answers})
    if iteration is not None and iteration not in kept:
        raise ConfigError(f"{folder.name} holds no answers of iteration {iteration}, but of {kept}")
    shown = 0
    for (of, number), group in groupby(answers, key=lambda each: (each["iteration"], each["question"])):
        question = list(group)
        wanted = [each for each in question if which in ("all", "right" if each["right"] else "wrong")]
        if iteration not in (None, of) or not wanted or shown == count:
            continue
        shown += 1
        right, mean = sum(each["right"] for each in question), sum(each["reward"] for each in question) / len(question)
        print(f"iteration {of}, question {number}: {right} of {len(question)} right, mean reward {mean:.3g}")
        _print_wrapped("asked", question[0]["prompt"])
        _print_wrapped("expected", question[0]["expected"])
        for answer in sorted(wanted, key=lambda each: (-each["reward"], each["sample"])):
            verdict = verdict_of(answer["output"], answer["expected"], is_right=answer["right"])
            parts = "".join(f"  {name} {value:.3g}" for name, value in answer["parts"].items())
            numbers = f"reward {answer['reward']:.3g}{parts}  advantage {answer['advantage']:+.3f}"
            cut = "" if answer["finished"] else "  cut"
            print(visible(f"  {verdict}  {numbers}  {answer['tokens']} tokens{cut}"))
            _print_wrapped("", answer["output"])
        print()
    print(f"iterations with answers (--iteration N): {', '.join(map(str, kept)) or 'none'}")


def show_samples(store: Store, name: str, *, as_json: bool) -> int:
    """Print what a model wrote on each prompt over the iterations of its training, or those of an evaluation."""
    title, path = _find_samples(store, name)
    found = [{key: record.get(key) for key in ("iteration", "prompt", "text")} for record in Records(path).read()]
    if as_json:
        print_json(found)
        return 0
    print(visible(title))
    for prompt in dict.fromkeys(str(record["prompt"]) for record in found):
        print(f"\n{printable(prompt)}")
        for record in found:
            if record["prompt"] == prompt:
                _print_wrapped("" if record["iteration"] is None else str(record["iteration"]), str(record["text"]))
    if not found:
        print("no samples yet")
    return 0


def _find_samples(store: Store, name: str) -> tuple[str, Path]:
    """Return a title and the samples file of a step in progress, or of an artifact."""
    for key in list_folder(store.outputs / "work"):
        work = store.work(key)
        executions = locks.read_attempts(work)
        if executions and executions[-1].get("step") == name and locks.is_held(store.lock(key)):
            return f"{name}, in progress ({work})", work / "ckpt" / "records" / "samples.jsonl"
    place = resolve(store, name)
    if not (place / "samples.jsonl").is_file():
        raise DataError(f"{place.name} has no samples, which only pretrainings and evaluations with prompts have")
    return place.name, place / "samples.jsonl"


def printable(text: str) -> str:
    """Return generated text with control characters escaped."""
    return visible(with_calls(text).replace("\t", "    "))


def _print_wrapped(title: str, text: str) -> None:
    """Print the wrapped lines of a text, the first one next to a title."""
    width = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)
    title = f"  {visible(title):<9}"
    for line in printable(text).splitlines() or [""]:
        for part in textwrap.wrap(line, max(20, width - len(title)), drop_whitespace=False) or [""]:
            print(f"{title}{part}".rstrip())
            title = " " * len(title)
