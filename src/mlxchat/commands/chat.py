"""mlxchat chat: talk to a trained model in the terminal, or have a base model continue text."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import Parser, make_naming_parser, outputs_folder, take_names
from mlxchat.errors import ConfigError
from mlxchat.store.integrity import check_model
from mlxchat.store.naming import describe_model, find_model
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.engine.tools import PythonTool

MODEL = "the model, as ID; or hf:FOLDER, hf:ORGANISATION/NAME: any model that mlx-lm opens"
PYTHON_TOOL = "run the Python that the model calls, confined (off: sums and .count alone are answered)"


def main(arguments: list[str]) -> int:
    """Answer one question with -p, or converse until /quit."""
    parser = make_naming_parser(
        "chat", "Talk to a model of the outputs folder; one that was only pretrained continues text.", "[ID]"
    )
    parser.add_argument("-p", "--prompt", help="answer or continue this one and leave; - reads it from standard input")
    parser.add_argument("--model", help=MODEL)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many tokens (default: 50)")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens that have this share together")
    parser.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python-tool", action="store_true", help=PYTHON_TOOL)
    add_precision(parser)
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "chat", 0, 1, "[ID] [-p QUESTION]")
    if names and options.model:
        raise ConfigError(f"two models are named, {names[0]} and --model {options.model}; expected one")
    if names and " " in names[0]:
        raise ConfigError(f'"{names[0]}" is no model. To ask it: mlxchat chat -p {shlex.quote(names[0])}')
    options.model = options.model or (names[0] if names else None)
    if (options.model or "").startswith("hf:"):
        return _chat_with_another(options)
    store = Store(outputs_folder(settings))
    found = find_model(store, options.model)
    check_model(found.place)
    print(f"model: {describe_model(store, found)}", file=sys.stderr)

    from mlxchat.terminal.chat import Chat

    chat = Chat.load(
        found.place,
        temperature=options.temperature,
        top_k=options.top_k or None,
        max_tokens=options.max_tokens,
        seed=options.seed,
        system=options.system,
        top_p=options.top_p,
        python=python_tool() if options.python_tool else None,
        bits=options.bits,
        kv_bits=options.kv_bits,
    )
    if options.prompt is not None:
        chat.answer_once(options.prompt)
    else:
        chat.converse()
    return 0


def _chat_with_another(options: Namespace) -> int:
    """Chat with a model that is none of ours, by mlx-lm."""
    refused = [f"--{name.replace('_', '-')}" for name in ("python_tool", "bits", "kv_bits") if getattr(options, name)]
    if refused:
        raise ConfigError(f"{', '.join(refused)} is only for models of ours; {options.model} is run by mlx-lm as it is")
    from mlxchat.interop.outside_folder import outside_folder
    from mlxchat.terminal.outside import OutsideChat

    chat = OutsideChat.open(
        outside_folder(options.model), options.model.removeprefix("hf:"), system=options.system, seed=options.seed,
        temperature=options.temperature, top_k=options.top_k or None, top_p=options.top_p,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    if options.prompt is not None:
        chat.answer_once(options.prompt)
    else:
        chat.converse()
    return 0


def python_tool() -> PythonTool:
    """Return what runs the programs of answers.

    Raises:
        ConfigError: this machine cannot confine them.
    """
    from mlxchat.engine.tools import PythonTool

    tool = PythonTool()
    tool.check()
    return tool


def add_precision(parser: Parser) -> None:
    """Add the options that trade exactness and speed for memory."""
    parser.add_argument(
        "--bits", type=int, choices=(8, 4), help="decode with weights of so many bits; says what it costs"
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 4),
        help="keep keys and values of the past in so many bits, for long contexts",
    )
