"""mlxchat distill: collect a teacher's answers from an OpenAI-compatible endpoint as training data."""

from __future__ import annotations

import json
import math
import os
from argparse import ArgumentTypeError, Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlxchat.commands.arguments import Parser, amount, number, positive
from mlxchat.errors import ConfigError, visible

if TYPE_CHECKING:
    from mlxchat.distill.collect import Question

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
    """Declare `mlxchat distill`."""
    parser.take_names("QUESTIONS", about=_ABOUT)
    parser.use("--teacher URL --out FILE.jsonl")
    parser.description = (
        "Ask a teacher behind an OpenAI-compatible endpoint, and write its answers as a file to train on."
    )
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
