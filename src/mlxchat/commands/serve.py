"""mlxchat serve: a model over HTTP, with a page to chat in."""

from __future__ import annotations

import os
import sys
from functools import partial

from mlxchat.commands.arguments import Parser, make_naming_parser, take_names
from mlxchat.commands.chat import PYTHON_TOOL, add_precision, python_tool
from mlxchat.errors import ConfigError
from mlxchat.store.integrity import check_model
from mlxchat.store.naming import describe_model, find_model, run_of
from mlxchat.store.store import Store

_KEY = "MLXCHAT_API_KEY"
_LIMITS = {
    "max-tokens": "tokens of an answer", "max-messages": "messages of a conversation",
    "max-message-chars": "characters of a message", "max-conversation-chars": "characters of a conversation",
    "max-choices": "answers to one request", "max-rows": "answers computed at a time",
    "max-queue": "answers that wait; more are refused with 429",
    "max-models": "models in memory; requests for further ones wait until one is idle",
    "kept-tokens": "tokens of conversations that are not read again with their next turn (default: 8192; 0: none)",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Serve until a signal comes."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "serve", 0, 1, "[ID]")
    from mlxchat.commands.arguments import outputs_folder

    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}, expected 0 to 65535")
    if not 0 <= options.temperature <= 2 or options.top_k < 0 or options.grace_seconds < 0:
        raise ConfigError("--temperature must be from 0 to 2, --top-k and --grace-seconds at least 0")
    store = Store(outputs_folder(settings))
    found = find_model(store, names[0] if names else None)

    from mlxchat.serve.guard import is_loopback  # FastAPI takes most of a second

    loopback = is_loopback(options.host)
    key = options.api_key or os.environ.get(_KEY) or None
    if not loopback and key is None:
        raise ConfigError(
            f"--host {options.host} can be reached from other machines, so a key is needed: --api-key KEY or {_KEY}. "
            "Clients send it as Authorization: Bearer KEY"
        )
    from mlxchat.serve.app import make_app
    from mlxchat.serve.limits import Limits
    from mlxchat.serve.models import Models, read_model
    from mlxchat.serve.prompts import Defaults
    from mlxchat.serve.run import run_server
    from mlxchat.serve.service import Service
    from mlxchat.serve.worker import Worker, load_scheduler, rows_that_fit

    chosen = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in _LIMITS}
    limits = Limits(**{name: value for name, value in chosen.items() if value is not None})
    answering = {
        "bits": options.bits, "kv_bits": options.kv_bits, "python_tool": options.python_tool,
        "temperature": options.temperature, "top_k": options.top_k,
    }  # fmt: skip
    models = Models(store, found.place, answering, within=run_of(store, found))
    model = models.find(None)
    read_model(model.folder)
    check_model(model.folder)
    rows_that_fit(model, limits, bits=options.bits, kv_bits=options.kv_bits)
    print(f"model: {describe_model(store, found)}", file=sys.stderr)
    defaults = Defaults(temperature=options.temperature, top_k=options.top_k or None)
    python = python_tool() if options.python_tool else None
    load = partial(load_scheduler, python=python, bits=options.bits, kv_bits=options.kv_bits)
    service = Service(models, Worker(limits, load), limits, defaults)
    app = make_app(service, api_key=key, loopback_only=loopback and key is None, cors=options.cors)
    return run_server(
        app, options.host, options.port, name=found.place.name, key_needed=key is not None,
        grace_seconds=options.grace_seconds, log_requests=options.log_requests,
    )  # fmt: skip


def _parser() -> Parser:
    parser = make_naming_parser(
        "serve", "Serve the models of the outputs folder: OpenAI's interface, nanochat's, and a page to chat in."
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1); others need a key")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send; better in {_KEY}")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="let pages of this site ask")
    parser.add_argument("--temperature", type=float, default=0.8, help="of requests that name none (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="of requests that name none (default: 50; 0: off)")
    parser.add_argument(
        "--grace-seconds", type=int, default=30, metavar="N", help="to finish answers when asked to stop (default: 30)"
    )
    parser.add_argument("--python-tool", action="store_true", help=PYTHON_TOOL)
    add_precision(parser)
    parser.add_argument("--log-requests", action="store_true", help="a line per request, never what was said")
    for name, meaning in _LIMITS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    return parser
