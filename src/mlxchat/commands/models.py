"""Verbs for models: export and import in the formats of other tools, fuse, chat, serve."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import Parser, make_naming_parser, outputs_folder, quoted, split_words, take_names
from mlxchat.config.wording import format_bytes
from mlxchat.errors import ConfigError, StoreError, suggest, visible
from mlxchat.store.bases import is_adapter
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import IMPORTS, describe_model, find_model, links, run_of
from mlxchat.store.store import Store
from mlxchat.store.transfer import is_url
from mlxchat.store.verify import check_model

if TYPE_CHECKING:
    from mlxchat.engine.tools import PythonTool
    from mlxchat.interop.exporting import Checkpoint


FORMATS = ("hf", "nanochat", "gguf", "mlx", "mlx-adapter", "peft")
_MEASURED_TOKENS = 8192
_TOOLS = {
    "hf": "transformers' NanoChatForCausalLM",
    "nanochat": "nanochat's own files",
    "mlx": "mlx-lm",
    "mlx-adapter": "mlx-lm, beside their base",
    "peft": "PEFT, beside their base",
}


def export(arguments: list[str]) -> int:
    """Export a model to another tool, or artifacts with their closure to a place."""
    parser = make_naming_parser(
        "export",
        "Copy artifacts, and all that they were made from, to a folder (as rsync likes it) or a tar file. "
        "Or, with --to hf, nanochat, gguf or mlx, write one model to PATH as that tool reads it; mlx-adapter and "
        "peft: its adapters alone.",
        "ID",
    )
    parser.usage = (
        "mlxchat export ID… --to PLACE [--public] [outputs=PATH]\n"
        "       mlxchat export ID --to hf|nanochat|gguf|mlx|mlx-adapter|peft PATH [--quantize 4|8]\n"
        "                      [--dtype float32|bfloat16] [--push ORGANISATION/NAME [--public]] [--force]\n"
        "                      [outputs=PATH]"
    )
    parser.add_argument("--to", metavar="PLACE", help="a folder, FILE.tar, .tar.gz, .tgz, .tar.xz, a URL; or a format")
    parser.add_argument("--quantize", type=int, choices=(4, 8), help="bits of the matrices (--to mlx)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the other numbers (--to hf, mlx)")
    parser.add_argument(
        "--push", metavar="REPO", help="upload it to this repository of the Hub, private unless --public"
    )
    parser.add_argument("--public", action="store_true", help="everybody may see the repository")
    parser.add_argument("--force", action="store_true", help="replace what is at PATH")
    options = parser.parse_intermixed_args(arguments)
    if options.to not in FORMATS:
        formats = ("quantize", "dtype", "push", "force", *(() if is_url(options.to or "") else ("public",)))
        given = [f"--{key}" for key in formats if getattr(options, key)]
        if given:
            raise ConfigError(f"{given[0]} is of formats: --to {', '.join(FORMATS)} and a PATH behind it")
        from mlxchat.commands.artifacts import main_export

        return main_export(arguments)
    form = f"ID --to {options.to} PATH"
    words, settings = take_names(options.settings, "export", 1, None, form)
    if len(words) > 2 or (len(words) == 1 and not options.push):
        raise ConfigError(
            f"--to {options.to} is a format: expected mlxchat export {form}. "
            f"To copy artifacts to a folder of that name: --to ./{options.to}"
        )
    if options.public and not options.push:
        raise ConfigError("--public is of --push")
    return _export(
        Store(outputs_folder(settings)), words[0], options.to, Path(words[1]) if len(words) > 1 else None,
        bits=options.quantize, dtype=options.dtype, force=options.force, repository=options.push,
        public=options.public,
    )  # fmt: skip


def _export(
    store: Store, name: str, target: str, path: Path | None, *, bits: int | None, dtype: str | None, force: bool,
    repository: str | None, public: bool,
) -> int:  # fmt: skip
    from mlxchat.hub.upload import check_repository, push_folder
    from mlxchat.interop import exporting
    from mlxchat.store.files import check_free, whole_folder
    from mlxchat.store.verify import find_damage

    place = find_model(store, name).place
    token = check_repository(repository, public=public) if repository else ""
    if path is not None:
        _check_outside(store, path)
        check_free(path, force=force)
    checkpoint = exporting.open_checkpoint(place)
    exporting.check_export(checkpoint, target, bits=bits, dtype=dtype)
    for each in (place, *checkpoint.bases):
        if damage := list(find_damage(each, read_manifest(each))):
            raise StoreError(f"{each.name} is not what was published: {damage[0]}. mlxchat verify tells more")
    with ExitStack() as opened:
        if kept := path is not None:
            to = path
        else:
            to = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="mlxchat-export-"))) / place.name
        with whole_folder(to, force=force) as out:
            notes = _write(store, place, checkpoint, target, out, bits=bits, dtype=dtype, repository=repository)
        size = format_bytes(sum(file.stat().st_size for file in to.rglob("*") if file.is_file()))
        print(f"exported {place.name}{f' to {to}' if kept else ''} for {_TOOLS[target]} ({size})")
        for note in notes:
            print(f"  {visible(note)}")
        if repository:
            rid = read_manifest(place)["rid"]
            message = f"{place.name} from mlxchat ({target}), artifact {rid}"
            address = push_folder(to, repository, token, message=message, public=public)
            print(f"pushed to {repository}, {'public' if public else 'private'}: {visible(address)}")
    return 0


def _write(
    store: Store, place: Path, checkpoint: Checkpoint, target: str, out: Path, *, bits: int | None,
    dtype: str | None, repository: str | None,
) -> list[str]:  # fmt: skip
    """Write an export's files and its model card; return what is to be told of it."""
    from mlxchat.interop import exporting
    from mlxchat.report.card import render_card
    from mlxchat.store.fingerprint import hash_file

    notes: list[str] = []
    how: dict[str, str] = {}
    if target == "hf":
        exporting.write_hf(checkpoint, out, dtype=dtype)
    elif target == "nanochat":
        snapshot = exporting.write_nanochat(checkpoint, out)
        notes.append(f"For nanochat's code of {_MONTHS[snapshot]}.")
        how = _nanochat_words(checkpoint, snapshot)
    elif target == "mlx-adapter":
        exporting.write_mlx_adapter(checkpoint, out)
        how, notes = _adapter_words(checkpoint, "mlx")
    elif target == "peft":
        exporting.write_peft_adapter(checkpoint, out)
        how, notes = _adapter_words(checkpoint, "hf")
    else:
        exporting.write_mlx(checkpoint, out, bits=bits, dtype=dtype)
        own = exporting.needs_model_file(checkpoint)
        how = {"trust": " --trust-remote-code" if own else ""}
        if own:
            notes.append(
                "mlx-lm does not know this architecture: the folder has a model file of its own (--trust-remote-code)."
            )
    if checkpoint.bases and target not in ("mlx-adapter", "peft"):
        notes.append(f"Its adapters were put into the weights of {checkpoint.bases[0].name}.")
    if dtype == "bfloat16" and not bits:
        notes.append("Its numbers were rounded to bfloat16.")
    if bits:
        notes.append(_measure(store, place, checkpoint, bits, dtype))
    weights = "adapters.safetensors" if checkpoint.bases else "model.safetensors"
    card = render_card(
        store, place, target=target, how=how, notes=notes, sha256=hash_file(place / weights),
        chats=checkpoint.chats, repository=repository,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


_MONTHS = {"oct2025": "October 2025", "jul2026": "July 2026"}


def _adapter_words(checkpoint: Checkpoint, form: str) -> tuple[dict[str, str], list[str]]:
    """Return how adapters and their base, in the format `form`, are used together, and what is to be told of them."""
    from mlxchat.interop.exporting import needs_model_file

    base, *below = checkpoint.bases
    notes = [
        f"Adapters for {base.name}, whose weights are not among these files: mlxchat export {base.name} --to {form} "
        "BASE."
    ]
    if below:
        notes.append(f"{base.name} holds adapters itself; that export puts them into its weights.")
    bits = (checkpoint.facts.get("adapter") or {}).get("bits")
    if bits:
        notes.append(
            f"They were trained on matrices of {bits} bits. On the base as it is they say something slightly else; "
            "--to mlx without -adapter is exactly the model that was trained."
        )
    return {"trust": " --trust-remote-code" if needs_model_file(checkpoint) else "", "adapter": "yes"}, notes


def _nanochat_words(checkpoint: Checkpoint, snapshot: str) -> dict[str, str]:
    """Return where nanochat's scripts look for such a model, and which of them runs it."""
    stage = str(checkpoint.facts.get("stage"))
    source = {"sft": "chatsft", "rl": "chatrl", "midtrain": "mid"}.get(stage, "chatsft") if checkpoint.chats else "base"
    if snapshot == "jul2026" and source == "mid":
        source = "chatsft"
    short = {"chatsft": "sft", "chatrl": "rl", "mid": "mid", "base": "base"}[source]
    script = (
        f"chat_cli -i {short}"
        if checkpoint.chats
        else ("base_eval --eval sample" if snapshot == "jul2026" else "base_loss")
    )
    return {
        "snapshot": _MONTHS[snapshot], "source": source, "script": script, "tag": f"d{checkpoint.sizes.num_layers}",
    }  # fmt: skip


def _measure(store: Store, place: Path, checkpoint: Checkpoint, bits: int, dtype: str | None) -> str:
    """Return a sentence on how many bits per byte of text the quantised weights cost."""
    from mlxchat.evals.rounding import bits_per_byte_of_both, held_out_rows

    rows, what = held_out_rows(store, place, checkpoint.tokenizer, checkpoint.sizes.context_tokens, _MEASURED_TOKENS)
    before, after = bits_per_byte_of_both(checkpoint, rows, bits, dtype)
    return (
        f"Weights of {bits} bits: {after:.4f} bits per byte of {what} instead of {before:.4f} "
        f"({after - before:+.4f}, {(after - before) / before:+.1%})."
    )


def _check_outside(store: Store, path: Path) -> None:
    artifacts = (store.outputs / "store").resolve()
    inside = path.resolve()
    if inside in (artifacts, artifacts.parent) or artifacts in inside.parents:
        raise ConfigError(f"{path} is in the store; an export goes elsewhere")


IMPORT_FORMATS = ("nanochat", "hf", "adapter")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/.+)?")


def import_as(format_name: str, arguments: list[str]) -> int:
    """Import a model, unless it is there, and give it a name."""
    parser = Parser(
        prog=f"mlxchat import {format_name}",
        description={
            "nanochat": "Take in a checkpoint as nanochat writes it: model_<step>.pt, meta_<step>.json, tokenizer.pkl.",
            "hf": "Take in a folder of NanoChatForCausalLM: config.json, safetensors, tokenizer.json.",
            "adapter": "Take in adapters that mlx-lm trained on a model of ours: adapters.safetensors, "
            "adapter_config.json.",
        }[format_name],
        epilog="It is used as import:NAME: pipeline.rl.checkpoint=import:NAME, mlxchat serve import:NAME",
        allow_abbrev=False,
    )
    parser.add_argument("settings", nargs="*", metavar="WHAT", help="ORGANISATION/NAME of the Hub, or a folder")
    parser.add_argument("--name", help="what to call it (default: the last part of WHAT)")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of the repository (default: main)")
    if format_name == "nanochat":
        parser.add_argument("--step", type=int, help="which of several checkpoints (default: the last)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_const", const=True, help="it has learnt to chat, whatever its files say")
    if format_name == "adapter":
        parser.add_argument("--base", required=True, metavar="ID", help="the model of ours that they were trained on")
    else:
        kind.add_argument("--base", dest="chat", action="store_const", const=False, help="it has not")
    parser.add_argument("--replace", action="store_true", help="let the name stand for this model from now on")
    options = parser.parse_intermixed_args(arguments)
    words, settings = split_words(options.settings)
    if len(words) != 1:
        raise ConfigError(f"expected mlxchat import {format_name} WHAT: a repository of the Hub, or a folder")
    outputs, (what,) = outputs_folder(settings), words
    key, value = _place(what)
    name = options.name or Path(value).resolve().name
    if not _NAME.fullmatch(name):
        raise ConfigError(f'"{name}" is no name for an import: letters, digits, . _ - and no / are. Give --name NAME')
    overrides = [
        f"outputs={quoted(str(outputs))}", "stage=imported", "pipeline=imported", "name=import",
        f"imported.format={format_name}", f"imported.{key}={quoted(value)}", f"imported.name={quoted(name)}",
    ]  # fmt: skip
    store = Store(outputs)
    if format_name == "adapter":
        base = f"artifact:{find_model(store, options.base).place.name}"
        overrides.append(f"++pipeline.imported.checkpoint={quoted(base)}")
    if options.revision != "main":
        overrides.append(f"imported.revision={quoted(options.revision)}")
    if getattr(options, "step", None) is not None:
        overrides.append(f"imported.step={options.step}")
    if options.chat is not None:
        overrides.append(f"imported.chat={str(options.chat).lower()}")
    return _import(store, name, overrides, replace=options.replace)


def forget(store: Store, name: str) -> int:
    """Remove the name of an import; the artifact stays until it is collected.

    Raises:
        ConfigError: there is no import of this name.
    """
    link = store.outputs / "refs" / IMPORTS / name
    if not _NAME.fullmatch(name) or not link.is_symlink():
        raise ConfigError(f'there is no import "{name}".{suggest(name, links(store, IMPORTS))}')
    link.unlink()
    print(f"import:{name} stands for nothing any more. To remove what nobody needs: mlxchat gc")
    return 0


def tell_forms(what: str) -> str:
    """Return how `mlxchat import nanochat` alone should have been said, where that is also the name of a folder."""
    base = " --base ID" if what == "adapter" else ""
    text = f'"{what}" is a format: expected mlxchat import {what} WHAT{base}, a repository of the Hub or a folder.'
    if Path(what).exists():
        text += f" To take in the artifacts of the folder {what}: mlxchat import ./{what}"
    return text


def _import(store: Store, name: str, overrides: list[str], *, replace: bool) -> int:
    from mlxchat.composition.compose import compose_config
    from mlxchat.sweep.job import plan_of, run_pipeline

    composed = compose_config(overrides)
    (step,) = plan_of(composed.config, store)
    known = links(store, IMPORTS)
    before = read_manifest(known[name])["rid"] if name in known else None
    if before is not None and before != step.rid and not replace:
        raise ConfigError(
            f"import:{name} is another model already ({known[name].name}). Give --name NAME, or --replace to let the "
            "name stand for this one"
        )
    if not step.done:
        run_pipeline(composed, is_verb=True)
        store.forget()
    made = store.find_made(step.key)
    assert made is not None, "a run that ends has made it"
    store.prepare()
    store.set_ref(IMPORTS, name, made)
    print(f"import:{name} is {made.name}: mlxchat chat import:{name}, mlxchat report import:{name}")
    return 0


def _place(what: str) -> tuple[str, str]:
    """Return which setting a source belongs to, and its value."""
    path = Path(what).expanduser()
    if path.exists() or what.startswith((".", "/", "~")):
        return "folder", str(path)
    if _REPOSITORY.fullmatch(what):
        return "repository", what.rstrip("/")
    near = suggest(what, (each.name for each in Path().iterdir() if each.is_dir()))
    raise ConfigError(
        f'"{what}" is neither a folder nor a repository of the Hub: expected ORGANISATION/NAME, such as '
        f"karpathy/nanochat-d32.{near}"
    )


def fuse(arguments: list[str]) -> int:
    """Fuse a checkpoint that holds adapters, unless that was done before, and say what it is called."""
    parser = make_naming_parser(
        "fuse", "Put a model's adapters into the weights below them: a checkpoint with all of its weights.", "ID"
    )
    options = parser.parse_intermixed_args(arguments)
    (name,), settings = take_names(options.settings, "fuse", 1, 1, "ID")
    store = Store(outputs_folder(settings))
    place = find_model(store, name).place
    if not is_adapter(place):
        raise ConfigError(f"{place.name} has all of its weights already: there are no adapters to fuse")
    return _fuse(store, place.name)


def _fuse(store: Store, name: str) -> int:
    from mlxchat.composition.compose import compose_config
    from mlxchat.sweep.job import plan_of, run_pipeline

    composed = compose_config([
        f"outputs={quoted(str(store.outputs))}", "targets=[fused]", "name=fuse",
        f"+pipeline.fused={{stage: fused, checkpoint: {quoted(f'artifact:{name}')}}}",
    ])  # fmt: skip
    (step,) = plan_of(composed.config, store)
    if not step.done:
        run_pipeline(composed, is_verb=True)
        store.forget()
    made = store.find_made(step.key)
    assert made is not None, "a run that ends has made it"
    size = format_bytes(sum(file["bytes"] for file in read_manifest(made)["outputs"]))
    print(f"{name} with all of its weights is {made.name} ({size}). In a pipeline: artifact:{made.name}")
    return 0


MODEL = "the model, as ID; or hf:FOLDER, hf:ORGANISATION/NAME: any model that mlx-lm opens"
PYTHON_TOOL = "run the Python that the model calls, confined (off: sums and .count alone are answered)"


def chat(arguments: list[str]) -> int:
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


_KEY = "MLXCHAT_API_KEY"
_LIMITS = {
    "max-tokens": "tokens of an answer", "max-messages": "messages of a conversation",
    "max-message-chars": "characters of a message", "max-conversation-chars": "characters of a conversation",
    "max-choices": "answers to one request", "max-rows": "answers computed at a time",
    "max-queue": "answers that wait; more are refused with 429",
    "max-models": "models in memory; requests for further ones wait until one is idle",
    "kept-tokens": "tokens of conversations that are not read again with their next turn (default: 8192; 0: none)",
}  # fmt: skip


def serve(arguments: list[str]) -> int:
    """Serve until a signal comes."""
    parser = _serve_parser()
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "serve", 0, 1, "[ID]")
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


def _serve_parser() -> Parser:
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
