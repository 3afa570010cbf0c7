"""mlxchat distill: have a teacher behind an OpenAI-compatible endpoint answer questions, and train on its answers."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser
from mlxchat.errors import ConfigError

if TYPE_CHECKING:
    from mlxchat.config.schema import TaskItem
    from mlxchat.distill.order import Order
    from mlxchat.distill.questions import Question

_KEY = "MLXCHAT_TEACHER_API_KEY"
_PURPOSE = """Ask a teacher behind an OpenAI-compatible endpoint, and write its answers as a file to train on.
Answers are cached by the content of the request: the same command sends only the missing requests."""
_EXAMPLES = """examples
  mlxchat distill --teacher http://localhost:8000/v1 --task gsm8k --size 200 --only-correct \\
    --system 'Explain briefly. End with #### and the number alone.' --out gsm8k_teacher.jsonl
  mlxchat distill --teacher https://api.openai.com/v1 --key-env OPENAI_API_KEY --model NAME --questions mine.txt \\
    --price-in 0.15 --price-out 0.60 --max-cost 2 --rpm 500 --out mine_teacher.jsonl
  mlxchat distill … --questions templates.txt --fill persona=personas.txt --fill topic=topics.txt --size 1000 …"""


def distill(parser: Parser) -> None:
    """Declare `mlxchat distill`."""
    parser.use("--teacher URL --out FILE.jsonl")
    parser.description, parser.epilog = _PURPOSE, _EXAMPLES
    add = parser.add_argument
    add("--teacher", metavar="URL", required=True, help="the endpoint, such as http://localhost:8000/v1")
    add("--model", help="its name there (default: the endpoint's only one)")
    add("--key-env", metavar="NAME", help=f"the environment variable that holds its key (default: {_KEY}, if there)")
    add("--out", type=Path, metavar="FILE.jsonl", required=True, help="where the conversations go")
    add("--overwrite", action="store_true", help="also over a file that is not, or no longer, what distill wrote")
    what = parser.add_argument_group("questions, of one source")
    what.add_argument("--questions", type=Path, metavar="FILE", help="a .txt file, a question a line, or .jsonl")
    what.add_argument(
        "--fill", action="append", default=[], metavar="SLOT=FILE", help="lines that {SLOT} in them may be"
    )
    what.add_argument("--task", metavar="TASK", help="a task of mixtures, such as gsm8k")
    what.add_argument("--split", default="train", help="of the task (default: train)")
    what.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the task, as in a mixture")
    what.add_argument("--start", type=int, default=0, metavar="N", help="the first question used, from 0")
    what.add_argument("--size", type=int, metavar="N", help="so many questions (default: all)")
    how = parser.add_argument_group("how they are answered")
    how.add_argument("--system", metavar="TEXT", help="system prompt of each request")
    how.add_argument("--temperature", type=float, metavar="T", help="(default: the endpoint's own)")
    how.add_argument("--top-p", type=float, metavar="P", help="(default: the endpoint's own)")
    how.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="longest answer (default: 1024)")
    how.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each question (default: 1)")
    how.add_argument("--seed", type=int, metavar="N", help="of samples, sent and counted on; of --size and --fill")
    how.add_argument(
        "--body", action="append", default=[], metavar="KEY=JSON", help="a further field; null removes one"
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--only-correct", action="store_true", help="answers that the task (or the file) calls right")
    kept.add_argument(
        "--contains", action="store_true", help="with --only-correct: containing the file's answer is enough"
    )
    kept.add_argument("--keep-system", action="store_true", help="the system prompt, too")
    kept.add_argument("--keep-cut", action="store_true", help="answers that --max-tokens cut, too")
    kept.add_argument("--keep-thoughts", action="store_true", help="the <think> part of answers, too")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    limits.add_argument("--rpm", type=float, metavar="N", help="requests a minute")
    limits.add_argument("--tpm", type=float, metavar="N", help="tokens a minute")
    limits.add_argument("--retries", type=int, default=6, metavar="N", help="after 429, 5xx, cuts (default: 6)")
    limits.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds an answer may take (default: 300)"
    )
    limits.add_argument("--price-in", type=float, metavar="P", help="of a million input tokens")
    limits.add_argument("--price-out", type=float, metavar="P", help="of a million output tokens")
    limits.add_argument(
        "--max-cost", type=float, metavar="C", help="the most that all runs for --out may cost together"
    )
    limits.add_argument("--cache", type=Path, metavar="DIR", help="where answers are kept (default: in MLXCHAT_CACHE)")
    limits.add_argument(
        "--refresh", action="store_true", help="ask again what is known; without it a stopped command goes on"
    )
    limits.add_argument("--dry-run", action="store_true", help="count and estimate, ask nothing")
    parser.set_defaults(main=_distill)


def _distill(options: Namespace) -> int:
    """Send the requests without a kept answer, and write the file."""
    body, fills, item, problems = _read(options)
    if problems:
        raise ConfigError("\n".join(problems))
    key = os.environ.get(options.key_env or _KEY, "").strip() or None
    from mlxchat.distill.order import distill as answer
    from mlxchat.distill.order import estimate
    from mlxchat.distill.teacher import is_loopback

    order = _order(options, body, fills, item, key)
    if options.dry_run:
        print(estimate(order))
        return 0
    if key is not None and order.teacher.startswith("http://") and not is_loopback(order.teacher):
        print("note: the key and all texts travel unencrypted to another machine (http)", file=sys.stderr)
    return answer(order)


def _read(options: Namespace) -> tuple[dict[str, Any], dict[str, Path], TaskItem | None, list[str]]:
    """Return fields of the request, fills, the task, and all problems."""
    from mlxchat.distill.mixture_file import find_out_problems
    from mlxchat.distill.teacher import find_url_problems

    problems = find_url_problems(options.teacher)
    problems += find_out_problems(options.out, overwrite=options.overwrite)
    problems += _number_problems(options)
    if options.key_env is not None and not os.environ.get(options.key_env, "").strip():
        problems.append(f"--key-env: the environment has no {options.key_env}")
    key = os.environ.get(options.key_env or _KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        problems.append(f"{options.key_env or _KEY} holds what no key can be: blanks, controls or other than ASCII")
    body, fills = {}, {}
    for pair in options.body:
        name, equals, value = pair.partition("=")
        try:
            body[name] = json.loads(value)
        except ValueError:
            problems.append(f"--body {pair}: expected KEY=JSON, such as top_k=20 or 'stop=[\"###\"]'")
        if name in ("messages", "model", "stream", "n", "best_of") and equals:
            problems.append(f"--body {name} cannot be set: distill needs it as it is")
    if options.max_cost is not None and not _bounds(options, body):
        problems.append("--max-cost needs a bound of answers: --body leaves out max_tokens, and names none instead")
    for pair in options.fill:
        slot, _, place = pair.partition("=")
        if not slot.isidentifier() or not place:
            problems.append(f"--fill {pair}: expected SLOT=FILE for questions with {{SLOT}}")
        fills[slot] = Path(place)
    item = None
    if (options.task is None) == (options.questions is None):
        problems.append("expected either --task NAME or --questions FILE")
    elif options.questions is not None:
        problems += _file_problems(options)
    else:
        item, found = _task_item(options)
        problems += found
    return body, fills, item, problems


def _bounds(options: Namespace, body: dict[str, Any]) -> list[int]:
    """Return the bounds of an answer's tokens in a request; empty if one is unbounded, such as -1."""
    fields = {"max_tokens": options.max_tokens, **body}
    given = [fields[name] for name in ("max_tokens", "max_completion_tokens") if fields.get(name) is not None]
    bounded = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in given)
    return given if bounded else []


def _number_problems(options: Namespace) -> Iterator[str]:
    least = {"size": 1, "start": 0, "samples": 1, "max_tokens": 1, "concurrency": 1, "retries": 0, "seed": 0}
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            yield f"--{name.replace('_', '-')} is {value}, expected at least {bound}"
    for name in ("rpm", "tpm", "timeout"):
        value = getattr(options, name)
        if value is not None and not (0 < value < math.inf):
            yield f"--{name} is {value:g}, expected more than 0"
    for name in ("price_in", "price_out", "max_cost"):
        value = getattr(options, name)
        if value is not None and not (0 <= value < math.inf):
            yield f"--{name.replace('_', '-')} is {value:g}, expected at least 0"
    if options.max_cost is not None and (options.price_in is None or options.price_out is None):
        yield "--max-cost needs --price-in and --price-out: prices of a million tokens"
    if options.temperature is not None and not 0 <= options.temperature <= 2:
        yield f"--temperature is {options.temperature:g}, expected 0 to 2"
    if options.top_p is not None and not 0 < options.top_p <= 1:
        yield f"--top-p is {options.top_p:g}, expected above 0 and at most 1"
    if options.temperature == 0 and options.samples > 1:
        yield f"--samples is {options.samples} and --temperature 0: greedy answers are all the same"


def _file_problems(options: Namespace) -> Iterator[str]:
    if not options.questions.is_file():
        yield f"--questions: there is no file {options.questions}"
    elif options.questions.suffix not in (".txt", ".jsonl"):
        yield f"--questions: {options.questions} must end in .txt or .jsonl"
    elif options.questions.resolve() == options.out.resolve():
        yield f"--out is {options.out}, the file that the questions are in"
    if options.option:
        yield "--option belongs to --task"
    if options.contains and not options.only_correct:
        yield "--contains: requires --only-correct"
    if options.fill and options.only_correct:
        yield "--only-correct: filled questions have no answers to compare with"
    if options.fill and options.start:
        yield "--start: of filled questions --size draws some, --seed says which"


def _task_item(options: Namespace) -> tuple[TaskItem, list[str]]:
    """Return the task as a line of a mixture, and its problems."""
    from mlxchat.config.schema import TaskItem
    from mlxchat.tasks import find_item_problems, task_class

    # `size` bounds generated tasks; `stop` bounds the others.
    stop = None if options.size is None else options.start + options.size
    item = TaskItem(task=options.task, split=options.split, size=stop, start=max(0, options.start), stop=stop)
    problems = ["--fill belongs to --questions"] if options.fill else []
    problems += ["--contains belongs to --questions; of --task jsonl: --option contains=1"] if options.contains else []
    try:
        sources = task_class(options.task).source_options
    except ConfigError:
        sources = ()
    for pair in options.option:
        name, equals, value = pair.partition("=")
        if not equals:
            problems.append(f"--option {pair}: expected KEY=VALUE")
        elif name == "path":
            item.path = value
        elif name in sources:
            item.source[name] = value
        else:
            try:
                item.options[name] = float(value)
            except ValueError:
                problems.append(f"--option {pair}: expected a number")
    found = find_item_problems("questions", {"--task": item}, training=True)
    return item, [*problems, *(line.replace("questions.--task", f"--task {options.task}") for line in found)]


def _order(
    options: Namespace, body: dict[str, Any], fills: dict[str, Path], item: TaskItem | None, key: str | None
) -> Order:
    """Return the order for distill, with the questions read."""
    import asyncio

    from mlxchat.distill.collect import Limits
    from mlxchat.distill.cost import Prices
    from mlxchat.distill.mixture_file import Choice
    from mlxchat.distill.order import Order, find_model
    from mlxchat.distill.questions import without_repeats
    from mlxchat.hub.cache import cache_folder

    questions, source = _questions(options, fills, item)
    if options.only_correct and (unknown := [each.name for each in questions if each.judge is None]):
        raise ConfigError(f"--only-correct: {len(unknown)} questions have no answer to compare with ({unknown[0]}, …)")
    questions = without_repeats(questions)
    base = options.teacher.removesuffix("/").removesuffix("/chat/completions").rstrip("/")
    model = options.model or asyncio.run(find_model(base, key, min(options.timeout, 30.0)))
    return Order(
        teacher=base, key=key, model=model, questions=questions, source=source, system=options.system,
        temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens,
        samples=options.samples, seed=options.seed, body=body,
        limits=Limits(
            concurrency=options.concurrency, requests_per_minute=options.rpm, tokens_per_minute=options.tpm,
            retries=options.retries, max_cost=options.max_cost,
            max_tokens=max(_bounds(options, body), default=options.max_tokens),
        ),
        timeout_seconds=options.timeout, prices=Prices(options.price_in, options.price_out),
        choice=Choice(
            only_correct=options.only_correct, keep_cut=options.keep_cut, keep_thoughts=options.keep_thoughts,
            system=options.system if options.keep_system else None,
        ),
        out=options.out, cache=options.cache or cache_folder() / "distill", refresh=options.refresh,
    )  # fmt: skip


def _questions(
    options: Namespace, fills: dict[str, Path], item: TaskItem | None
) -> tuple[list[Question], dict[str, Any]]:
    """Return the questions, and where they come from."""
    from mlxchat.distill.questions import fill, questions_of_file, questions_of_task, read_fills
    from mlxchat.store.fingerprint import hash_file, plain_of

    if item is not None:
        return questions_of_task(item), {"task": plain_of(item)}
    path = options.questions
    questions = questions_of_file(path, contains=options.contains)
    source = {"file": path.name, "sha256": hash_file(path), "start": options.start, "size": options.size}
    if fills:
        source["fills"] = {slot: {"file": place.name, "sha256": hash_file(place)} for slot, place in fills.items()}
        return fill(questions, read_fills(fills), options.size, options.seed or 0), source
    stop = None if options.size is None else options.start + options.size
    if not questions[options.start : stop]:
        raise ConfigError(f"--start is {options.start}, but {path} has {len(questions)} questions")
    return questions[options.start : stop], source
