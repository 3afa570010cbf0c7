"""mlxchat data: download and show data of the Hub and of URLs; mlxchat distill: collect answers of a teacher."""

from __future__ import annotations

import json
import math
import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlxchat.commands.arguments import Parser, amount, count, number, positive
from mlxchat.config.verbs import VERBS
from mlxchat.config.wording import Table, aligned, format_bytes, format_count, plural
from mlxchat.errors import ConfigError, suggest, visible
from mlxchat.store.naming import latest, links, resolve
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.config.schema import Config, TaskItem
    from mlxchat.data.tokenizer import Tokenizer
    from mlxchat.data.tokens import Mixture
    from mlxchat.distill.collect import Question


def data(parser: Parser) -> None:
    words = {verb.partition(" ")[2]: purpose for verb, (_, purpose) in VERBS.items() if verb.startswith("data ")}
    parser.take_names("|".join(words), about=aligned(words.items()), first=words)


def _data(options: Namespace) -> int:
    """Refuse settings between `data` and its verb."""
    raise ConfigError(f"expected mlxchat data {options.names[0]} [SETTINGS]: settings go before or after both words")


def fetch(parser: Parser) -> None:
    parser.take_settings()
    parser.description = (
        "Fetch what the steps that are to run read from elsewhere: as much of the corpus as the horizon needs, the "
        "data of all tasks, CORE's bundle. What is there is not fetched again. For a single repository: hf download."
    )
    parser.add_argument("--dry-run", action="store_true", help="list everything without downloading")


def _fetch(options: Namespace) -> int:
    """Download what the settings need."""
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.hub.client import fetch_files, fetch_url
    from mlxchat.pipeline import plan_of
    from mlxchat.planning.inputs import find_files

    config = compose_config(*split_options(options.settings)).config
    store = Store(Path(config.outputs))
    groups, urls = find_files(config, plan_of(config, store), store, network=True, measure=not options.dry_run)
    for title, files in groups.items():
        if files:
            missing = format_bytes(sum(file.bytes for file in files if not file.is_there()))
            print(visible(f"{title} at {files[0].revision[:12]}: {plural(len(files), 'file')}, {missing} to fetch"))
    for url in urls:
        print(visible(url))
    if options.dry_run:
        return 0
    every = list({file: None for files in groups.values() for file in files or ()})
    fetch_files(every)
    for url, sha256 in urls.items():
        fetch_url(url, sha256=sha256)
    size = format_bytes(sum(file.bytes for file in every))
    print(f"everything is there: {plural(len(every), 'file')} of the Hub ({size}), {len(urls)} of other addresses")
    return 0


_STAGES = ("midtrain", "sft", "preference", "rl", "eval")
_EXAMPLES = """\
examples:
  mlxchat data show mixture=oct2025_sft -n 5
  mlxchat data show mixture=oct2025_mid --task spelling_bee --start 100
  mlxchat data show suite=chatcore --task humaneval
  mlxchat data show stage=midtrain experiment=speedrun_d20 --validation
  mlxchat data show '+sft.mixture.mine={task: jsonl, path: mine.jsonl}' --task mine
"""
_SAMPLED = 100
"""Number of conversations of a task that are rendered to estimate the mean length."""
_MARKS = ("⟦", "⟧")


def show(parser: Parser) -> None:
    parser.take_settings()
    parser.use("mixture=NAME|suite=NAME|stage=midtrain|sft|preference|rl|eval [SETTINGS]")
    parser.about = _EXAMPLES
    parser.description = (
        "Show conversations as a model is trained on them or asked them (default: stage=sft). "
        f"What is trained on stands between {' '.join(_MARKS)}."
    )
    add = parser.add_argument
    add("-n", "--count", type=count, default=3, help="number of conversations (default: 3)")
    add("--start", type=count, default=0, help="index of the first one, from 0")
    add("--task", help="only conversations of this task")
    add("--validation", action="store_true", help="show the stage's validation data")
    add("--tokenizer", metavar="ID|FOLDER", help="artifact or folder of the tokenizer (default: the latest one)")


def _show(options: Namespace) -> int:
    """Print the number of conversations of each task, and the first ones in the order of training."""
    from mlxchat.composition.compose import compose_config, split_config_dirs
    from mlxchat.data.tokens import Mixture
    from mlxchat.runner.context import stage_seed

    settings, dirs = split_config_dirs(options.settings)
    title, stage, overrides = _aim(settings)
    config = compose_config(overrides, dirs).config
    items = _items(config, stage, is_validation=options.validation)
    if options.task is not None and options.task not in items:
        raise ConfigError(f'there is no "{options.task}" in {title}: {", ".join(items)}.{suggest(options.task, items)}')
    # Seeds of the stages' orders.
    purpose, root = ("validation", config.data_seed) if options.validation else ("mixture", config.seed)
    is_mixture = stage in ("midtrain", "sft") and not options.validation
    order = getattr(config, stage).mixture_order if is_mixture else None
    mixture = Mixture(items, seed=stage_seed(root, stage, purpose), order=order)
    tokenizer, which = _find_tokenizer(Store(Path(config.outputs)), config, options.tokenizer)
    print(f"{title}{' (validation)' * options.validation}: {len(mixture):,} conversations, {which}\n")
    print(f"{_table_of(mixture, tokenizer).text()}\n")
    if any(task.is_paired for task in mixture.tasks().values()):
        print("of pairs the chosen answers are shown")
    elif stage in ("preference", "rl", "eval"):
        print("marked is the data's own answer, which a model that is asked does not see")
    elif getattr(config, stage).train_on == "all":
        print(f"{stage} trains on every token ({stage}.train_on=all), not only on what is marked")
    chosen = (each for each in range(len(mixture)) if options.task is None or mixture.task_of(each) == options.task)
    for index in islice(chosen, options.start, options.start + options.count):
        _print_conversation(mixture, index, tokenizer)
    return 0


def _aim(settings: list[str]) -> tuple[str, str, list[str]]:
    """Return a title, the stage whose data is shown, and the settings to compose."""
    chosen = dict(word.split("=", 1) for word in settings if word.startswith(("mixture=", "suite=", "stage=")))
    overrides = [word for word in settings if not word.startswith(("mixture=", "suite=", "stage="))]
    stage = chosen.get("stage", "eval" if "suite" in chosen else "sft")
    if stage not in _STAGES:
        raise ConfigError(f'stage is "{stage}", expected one of {", ".join(_STAGES)}.{suggest(stage, _STAGES)}')
    if "suite" in chosen:
        return f"suite {chosen['suite']}", "eval", [f"suite={chosen['suite']}", *overrides]
    if "mixture" in chosen:
        if stage not in ("midtrain", "sft"):
            raise ConfigError(f"mixture= is for midtrain and sft, not for {stage}")
        return f"mixture {chosen['mixture']}", stage, [f"mixture@{stage}.mixture={chosen['mixture']}", *overrides]
    return f"stage {stage}", stage, overrides


def _items(config: Config, stage: str, *, is_validation: bool) -> Mapping[str, TaskItem]:
    rl, pairs = config.rl, config.preference
    if stage == "rl":
        return {"evaluation": rl.evaluation} if is_validation else {"task": rl.task}
    if stage == "preference":
        return {"validation": pairs.validation} if is_validation else {"data": pairs.data}
    if stage == "eval":
        return config.suite
    section = config.midtrain if stage == "midtrain" else config.sft
    return section.validation if is_validation else section.mixture


def _find_tokenizer(store: Store, config: Config, named: str | None) -> tuple[Tokenizer, str]:
    """Return a tokenizer and its description."""
    from mlxchat.data.tokenizer import Tokenizer

    made = links(store, latest(store))
    steps = [step for step, node in config.pipeline.items() if node.get("stage") == "tokenizer" and step in made]
    if named is not None:
        place = Path(named) if (Path(named) / "tokenizer.json").is_file() else resolve(store, named)
        if not (place / "tokenizer.json").is_file():
            raise ConfigError(f"{place.name} has no tokenizer; give a tokenizer, a checkpoint, or a folder of one")
    elif steps:
        place = made[steps[0]]
    else:  # shows the same text; only the numbers of tokens are larger
        reason = f"since {store.outputs} has no tokenizer yet (--tokenizer names one)"
        return Tokenizer({bytes([byte]): byte for byte in range(256)}), f"tokens are bytes, {reason}"
    return Tokenizer.load(place), f"tokens of {place.name}"


def _table_of(mixture: Mixture, tokenizer: Tokenizer) -> Table:
    """Return the number and lengths of each task's conversations; means of a sample are marked with ~."""
    from mlxchat.data.tokenizer import render_conversation

    total, tasks, counts = 0.0, mixture.tasks(), mixture.counts()
    rows = []
    for name, task in tasks.items():
        places = range(0, len(task), max(1, -(-len(task) // _SAMPLED)))
        masks = [render_conversation(tokenizer, task[place], max_tokens=None)[1] for place in places]
        mean = sum(map(len, masks)) / len(masks)
        trained = sum(map(sum, masks)) / max(1, sum(map(len, masks)))
        about = "~" if len(places) < len(task) else ""
        total += mean * counts[name]
        rows.append([
            name, f"{counts[name]:,}", f"{counts[name] / len(mixture):.1%}", f"{about}{mean:,.0f}",
            f"{about}{trained:.0%}", f"{about}{format_count(mean * counts[name])}",
        ])  # fmt: skip
    rows.append(["all", f"{len(mixture):,}", "", f"~{total / len(mixture):,.0f}", "", f"~{format_count(total)}"])
    header = ["task", "conversations", "share", "tokens each", "trained", "tokens"]
    return Table(header=header, align="lrrrrr", rows=rows)


def _print_conversation(mixture: Mixture, index: int, tokenizer: Tokenizer) -> None:
    """Print a conversation with its special tokens; marks enclose trained tokens."""
    from mlxchat.data.tokenizer import render_conversation

    ids, mask = render_conversation(tokenizer, mixture[index], max_tokens=None)
    print(visible(f"── {index} · {mixture.name(index)} · {len(ids):,} tokens, {sum(mask):,} trained"))
    begin, end = _MARKS
    for trained, run in groupby(zip(mask, ids, strict=True), key=lambda each: each[0]):
        text = visible(tokenizer.decode([token for _, token in run]))
        print(f"{begin}{text}{end}" if trained else text, end="")
    print("\n")


_KEY = "MLXCHAT_TEACHER_API_KEY"
_FIND_SECONDS, _ANSWER_SECONDS = 30.0, 300.0
_ABOUT = f"""QUESTIONS: a .txt file (a question a line), a .jsonl file of question, prompt or messages, a task such as
gsm8k, or a line of a mixture such as '{{task: mmlu, split: auxiliary_train, stop: 500}}'

The endpoint's key is read from the environment variable {_KEY}.
Answers are cached by the content of the request: the same command sends only the missing requests.

example
  mlxchat distill gsm8k --limit 200 --teacher http://localhost:8000/v1 --only-correct \\
    --system 'Explain briefly. End with #### and the number alone.' --out gsm8k_teacher.jsonl"""


def distill(parser: Parser) -> None:
    parser.take_names("QUESTIONS", about=_ABOUT)
    parser.use("--teacher URL --out FILE.jsonl")
    parser.description = "Ask a teacher behind an OpenAI-compatible endpoint; write its answers as a file to train on."
    add = parser.add_argument
    add("--teacher", type=_address, metavar="URL", required=True, help="the endpoint, such as http://localhost:8000/v1")
    add("--model", help="name of the model (default: the endpoint's only one)")
    add("--out", type=Path, metavar="FILE.jsonl", required=True, help="file for the conversations")
    add("--limit", type=positive, metavar="N", help="use only the first N questions")
    add("--system", metavar="TEXT", help="system prompt of each request; not written to the file")
    add("--temperature", type=number(0, 2), metavar="T", help="(default: the endpoint's own)")
    add("--max-tokens", type=positive, default=1024, metavar="N", help="longest answer in tokens (default: 1024)")
    add("--samples", type=positive, default=1, metavar="N", help="answers to each question (default: 1)")
    body = "additional field of each request, such as top_p=0.9 or seed=1; null removes one"
    add("--body", type=_field, action="append", default=[], metavar="KEY=JSON", help=body)
    add("--conversations", action="store_true", help="the questions ask for whole conversations, answered as JSON")
    add("--only-correct", action="store_true", help="keep only answers that the task accepts or that equal the file's")
    add("--concurrency", type=positive, default=8, metavar="N", help="parallel requests (default: 8)")
    add("--price", type=_prices, metavar="IN,OUT", help="prices per million input and output tokens")
    add("--max-cost", type=amount, metavar="C", help="stop before the cost of this command exceeds C")
    add("--dry-run", action="store_true", help="estimate requests, tokens and cost; send nothing")


def _distill(options: Namespace) -> int:
    """Send the requests without a cached answer, and write the file."""
    try:
        from mlxchat.distill.collect import Order
        from mlxchat.distill.collect import distill as collect
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise ConfigError("mlxchat distill needs openai: pip install 'mlxchat[distill]'") from None
    import asyncio

    from mlxchat.distill.collect import CONVERSATION_FORMAT, clean
    from mlxchat.distill.teacher import Prices, find_model
    from mlxchat.hub.cache import cache_folder

    _check_out(options.out)
    body: dict[str, Any] = {
        "temperature": options.temperature, "max_tokens": options.max_tokens,
        "response_format": CONVERSATION_FORMAT if options.conversations else None, **dict(options.body),
    }  # fmt: skip
    body = {name: value for name, value in body.items() if value is not None}
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
    if options.max_cost is not None and (options.price is None or not limits):
        raise ConfigError("--max-cost needs --price IN,OUT, and a limit of answer tokens (--body removes max_tokens)")
    questions, about = _questions(options.names[0], options.limit)
    if options.only_correct and (unknown := [each.name for each in questions if each.judge is None]):
        raise ConfigError(f"--only-correct: {len(unknown)} questions have no answer to compare with ({unknown[0]}, …)")
    base = options.teacher.removesuffix("/").removesuffix("/chat/completions").rstrip("/")
    key = os.environ.get(_KEY, "").strip() or None
    order = Order(
        teacher=base, key=key, model=options.model or asyncio.run(find_model(base, key, _FIND_SECONDS)),
        questions=questions, source={**about, "limit": options.limit},
        system=None if options.system is None else clean(options.system), samples=options.samples, body=body,
        max_tokens=max(limits, default=options.max_tokens), concurrency=options.concurrency,
        timeout_seconds=_ANSWER_SECONDS, prices=Prices(*(options.price or ())), max_cost=options.max_cost,
        only_correct=options.only_correct, conversations=options.conversations,
        out=options.out, cache=cache_folder() / "distill",
    )  # fmt: skip
    return collect(order, dry_run=options.dry_run)


def _address(text: str) -> str:
    """Return an endpoint's address; the `type` of --teacher."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.password:
        raise ArgumentTypeError(f"expected an address such as http://localhost:8000/v1; the key is read from {_KEY}")
    return text


def _prices(text: str) -> tuple[float, ...]:
    """Return prices per million input and output tokens; the `type` of --price."""
    with suppress(ValueError):
        prices = tuple(map(float, text.split(",")))
        if len(prices) == 2 and all(0 <= price < math.inf for price in prices):
            return prices
    raise ArgumentTypeError(f"is {visible(text)}, expected two numbers such as 0.15,0.60")


def _field(text: str) -> tuple[str, Any]:
    """Return name and value of a field of requests; the `type` of --body."""
    name, _, value = text.partition("=")
    if name in ("messages", "model", "stream", "n", "best_of"):
        raise ArgumentTypeError(f"{name} cannot be set: distill sets it")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ArgumentTypeError(f"is {text}, expected KEY=JSON, such as top_k=20 or 'stop=[\"###\"]'") from None


def _check_out(out: Path) -> None:
    """Check that the file may be written: it is new, or an unchanged file of an earlier command."""
    from mlxchat.distill.collect import provenance_place
    from mlxchat.store.files import read_json
    from mlxchat.store.fingerprint import hash_file

    if out.suffix != ".jsonl" or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out is {out}, expected a file that ends in .jsonl, in a folder that exists")
    if out.exists() and (read_json(provenance_place(out)) or {}).get("sha256") != hash_file(out):
        raise ConfigError(f"--out: {out} was not written by mlxchat distill, or was changed since. Move it away")


def _questions(text: str, limit: int | None) -> tuple[list[Question], dict[str, Any]]:
    """Return the questions of a file, a task or a line of a mixture, and a description of their source."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from mlxchat.config.schema import TaskItem
    from mlxchat.distill.collect import questions_of_file, questions_of_task
    from mlxchat.store.fingerprint import hash_file, plain_of
    from mlxchat.tasks import find_item_problems

    if text.endswith((".txt", ".jsonl")):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"QUESTIONS: there is no file {path}")
        return questions_of_file(path)[:limit], {"file": path.name, "sha256": hash_file(path)}
    try:
        given = OmegaConf.create(text) if text.lstrip().startswith("{") else {"task": text}
        item = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskItem), given))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        accepted = "expected a file (.txt, .jsonl), a task or {task: …}"
        raise ConfigError(f"QUESTIONS is {visible(text)}, {accepted}: {str(error).partition(chr(10))[0]}") from None
    assert isinstance(item, TaskItem)
    if problems := list(find_item_problems("questions", {"QUESTIONS": item}, training=True)):
        raise ConfigError("\n".join(problems).replace("questions.QUESTIONS", "QUESTIONS"))
    return questions_of_task(item, limit), {"task": plain_of(item)}
