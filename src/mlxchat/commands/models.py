"""Verbs for models: export and import in other tools' formats, chat, serve."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import Parser, amount, count, number, positive, quoted
from mlxchat.config.wording import aligned, format_bytes
from mlxchat.errors import ConfigError, suggest, visible
from mlxchat.store.catalog import check_model
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import IMPORTS, describe_model, find_model, links
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.interop.exporting import Checkpoint

# Format of an export → what reads it.
_READERS = {
    "hf": "transformers' NanoChatForCausalLM",
    "nanochat": "nanochat's own files",
    "mlx": "mlx-lm",
    "gguf": "llama.cpp, LM Studio and Ollama",
    "mlx-adapter": "mlx-lm, adapters without their base",
    "peft": "PEFT, adapters without their base",
}
FORMATS = tuple(_READERS)


def export(parser: Parser) -> None:
    formats = aligned([[f"  {form}", reader] for form, reader in _READERS.items()])
    parser.take_names("ID PATH --to FORMAT", least=2, most=2, about=f"FORMAT:\n{formats}")
    parser.description = "Write a model to PATH in another tool's format, with a model card."
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--bits", type=int, choices=(8, 4), help="quantise to this many bits (--to mlx)")
    types = ("float32", "bfloat16", "f32", "f16", "bf16", "q8_0")
    parser.add_argument("--dtype", choices=types, help="float32, bfloat16: of other weights (hf, mlx); others: gguf")
    parser.add_argument("--hub", metavar="REPO", help="also upload it to this repository of the Hub")
    parser.add_argument("--public", action="store_true", help="with --hub: make the repository public")
    parser.add_argument("--license", metavar="ID", help="licence of the weights for the card: mit, apache-2.0, …")
    parser.add_argument("--force", action="store_true", help="replace what is at PATH")


def _export(options: Namespace) -> int:
    """Write a model in another tool's format to a folder, and upload it."""
    if options.public and not options.hub:
        raise ConfigError("--public requires --hub")
    from mlxchat.hub.places import check_repository, push_folder
    from mlxchat.interop import exporting
    from mlxchat.store.files import check_free, whole_folder

    store, target, force = Store(options.outputs), options.to, options.force
    place = find_model(store, options.names[0]).place
    token = check_repository(options.hub, public=options.public) if options.hub else ""
    path = Path(options.names[1])
    check_free(path, force=force)
    checkpoint = exporting.open_checkpoint(place)
    exporting.check_export(checkpoint, target, bits=options.bits, dtype=options.dtype)
    check_model(place)
    if target != "mlx":  # whose folders carry the model's own code
        exporting.check_computation(checkpoint)
    with whole_folder(path, force=force) as out:
        notes = _write(store, place, checkpoint, out, options)
    size = format_bytes(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    print(f"exported {place.name} to {path} for {_READERS[target]} ({size})")
    for note in notes:
        print(f"  {visible(note)}")
    if options.hub:
        message = f"{place.name} from mlxchat ({target}), artifact {read_manifest(place)['rid']}"
        address = push_folder(path, options.hub, token, message=message, public=options.public)
        print(f"pushed to {options.hub}, {'public' if options.public else 'private'}: {visible(address)}")
    return 0


def _write(store: Store, place: Path, checkpoint: Checkpoint, out: Path, options: Namespace) -> list[str]:
    """Write an export's files and its model card; return notes for the user."""
    from mlxchat.interop import exporting
    from mlxchat.model.checkpoint import needs_model_file
    from mlxchat.report.card import render_card
    from mlxchat.store.fingerprint import hash_file

    target, bits, dtype = options.to, options.bits, options.dtype
    notes, how = list[str](), dict[str, str]()
    own_code = needs_model_file(checkpoint.sizes)
    if target == "hf":
        exporting.write_hf(checkpoint, out, dtype=dtype)
    elif target == "nanochat":
        snapshot = exporting.write_nanochat(checkpoint, out)
        how = _nanochat_words(checkpoint, snapshot)
        notes.append(f"For nanochat's code of {how['snapshot']}.")
    elif target == "gguf":
        from mlxchat.interop.gguf import describe_differences, write_gguf

        how = {"file": write_gguf(checkpoint, out, dtype=dtype or "f32")}
        notes += describe_differences(checkpoint.tokenizer)
    elif target == "mlx":
        exporting.write_mlx(checkpoint, out, bits=bits, dtype=dtype)
        if own_code:
            notes.append("mlx-lm lacks this architecture: the folder includes its model file (--trust-remote-code).")
    else:
        exporting.write_adapters(checkpoint, out, target)
        how = {"adapter": "yes"}
        base, form = checkpoint.bases[0].name, "mlx" if target == "mlx-adapter" else "hf"
        notes.append(f"Adapters for {base}, whose weights are not here: mlxchat export {base} BASE --to {form}.")
        if packed := (checkpoint.facts.get("adapter") or {}).get("bits"):
            notes.append(f"They were trained on matrices of {packed} bits; --to mlx is exactly the trained model.")
    how["trust"] = " --trust-remote-code" if own_code else ""
    if checkpoint.bases and target not in ("mlx-adapter", "peft"):
        notes.append(f"Its adapters were merged into the weights of {checkpoint.bases[0].name}.")
    if rounded := f"{bits} bits" if bits else dtype if dtype == "bfloat16" else "":
        notes.append(f"Its weights were rounded to {rounded}.")
    weights = "adapters.safetensors" if checkpoint.bases else "model.safetensors"
    text = render_card(
        store, place, target=target, how=how, notes=notes, sha256=hash_file(place / weights),
        chats=checkpoint.chats, repository=options.hub, license=options.license,
    )  # fmt: skip
    (out / "README.md").write_text(text, encoding="utf-8")
    return notes


def _nanochat_words(checkpoint: Checkpoint, snapshot: str) -> dict[str, str]:
    """Return what the card says of nanochat: its version, the folder of the model, and the script that runs it."""
    old = snapshot == "oct2025"
    source, script = "base", "base_loss" if old else "base_eval --eval sample"
    if checkpoint.chats:
        stage = str(checkpoint.facts.get("stage"))
        source = {"rl": "chatrl", "midtrain": "mid" if old else "chatsft"}.get(stage, "chatsft")
        script = f"chat_cli -i {source.removeprefix('chat')}"
    month = "October 2025" if old else "July 2026"
    return {"snapshot": month, "source": source, "script": script, "tag": f"d{checkpoint.sizes.num_layers}"}


IMPORT_FORMATS = ("nanochat", "hf", "adapter")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WHAT = """FORMAT: nanochat (model_<step>.pt, meta_<step>.json, tokenizer.pkl), hf (NanoChatForCausalLM: config.json,
safetensors, tokenizer.json), adapter (adapters that mlx-lm or PEFT trained on a model of ours)
WHAT: ORGANISATION/NAME of the Hub, or a folder, such as nanochat's ~/.cache/nanochat/chatsft_checkpoints/d20"""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/.+)?")


def import_model(parser: Parser) -> None:
    parser.take_names("FORMAT WHAT", least=0, most=2, first=IMPORT_FORMATS, about=_WHAT)
    parser.description = (
        "Take in a model or adapters of another tool. import:NAME then stands for it: "
        "pipeline.rl.checkpoint=import:NAME, mlxchat serve import:NAME."
    )
    add = parser.add_argument
    add("--name", help="name of the import (default: the last part of WHAT)")
    add("--revision", default="main", help="commit, tag or branch of the repository (default: main)")
    add("--step", type=int, help="nanochat: training step of the checkpoint (default: the last)")
    add("--base", metavar="ID", help="adapter: the mlxchat model that they were trained on")
    add("--forget", metavar="IMPORT", help="remove the name import:IMPORT; gc may then remove the artifact")


def _import_model(options: Namespace) -> int:
    """Import a model, unless the store has it, and name it."""
    store = Store(options.outputs)
    if options.forget is not None:
        link = store.outputs / "refs" / IMPORTS / options.forget
        if options.forget not in links(store, IMPORTS):
            raise ConfigError(f'there is no import "{options.forget}".{suggest(options.forget, links(store, IMPORTS))}')
        link.unlink()
        print(f"import:{options.forget} removed. To remove unused artifacts: mlxchat gc")
        return 0
    if len(options.names) < 2:
        raise ConfigError("expected mlxchat import FORMAT WHAT: a repository of the Hub, or a folder")
    form, what = options.names
    if options.step is not None and form != "nanochat":
        raise ConfigError("--step requires the format nanochat")
    if (options.base is None) == (form == "adapter"):
        raise ConfigError("--base ID is for the format adapter, which requires it")
    key, value = _place(what)
    name = options.name or (Path(value).resolve() if key == "folder" else Path(value)).name
    if not _NAME.fullmatch(name):
        raise ConfigError(f'"{name}" is not an import name, expected letters, digits, . _ - and no /. Give --name NAME')
    overrides = [
        f"outputs={quoted(str(options.outputs))}", "stage=imported", "pipeline=imported", "name=import",
        f"imported.format={form}", f"imported.{key}={quoted(value)}", f"imported.name={quoted(name)}",
    ]  # fmt: skip
    if options.base is not None:
        base = f"artifact:{find_model(store, options.base).place.name}"
        overrides.append(f"++pipeline.imported.checkpoint={quoted(base)}")
    overrides += [f"imported.revision={quoted(options.revision)}"] if options.revision != "main" else []
    overrides += [f"imported.step={options.step}"] if options.step is not None else []
    made = _import(store, name, overrides)
    store.prepare()
    store.set_ref(IMPORTS, name, made)
    print(f"import:{name} is {made.name}: mlxchat chat import:{name}, mlxchat report import:{name}")
    return 0


def _place(what: str) -> tuple[str, str]:
    """Return the setting of a source, folder or repository, and its value."""
    path = Path(what).expanduser()
    if path.exists() or what.startswith((".", "/", "~")):
        return "folder", str(path)
    if _REPOSITORY.fullmatch(what):
        return "repository", what.rstrip("/")
    raise ConfigError(f'"{what}" is neither a folder nor a repository of the Hub, such as karpathy/nanochat-d32')


def _import(store: Store, name: str, overrides: list[str]) -> Path:
    """Run the import unless it is done; return its artifact."""
    from mlxchat.composition.compose import compose_config
    from mlxchat.pipeline import plan_of, run_pipeline

    composed = compose_config(overrides)
    (step,) = plan_of(composed.config, store)
    known = links(store, IMPORTS).get(name)
    if known is not None and read_manifest(known)["rid"] != step.rid:
        raise ConfigError(f"import:{name} is another model ({known.name}). Give --name NAME, or first --forget {name}")
    if not step.done:
        run_pipeline(composed, is_verb=True)
        store.forget()
    made = store.find_made(step.key)
    assert made is not None, "a run that ends has made it"
    return made


_THIRD_PARTY = "hf:"
_KEY = "MLXCHAT_API_KEY"
_MODELS = "MODEL: as ID, or hf:FOLDER, hf:ORGANISATION/NAME for one that mlx-lm opens"
_BITS_HELP = "quantise the weights to this many bits; prints the loss in quality"
_LIMITS = {
    "max-rows": "answers generated at the same time", "max-queue": "waiting answers; more get status 429",
    "max-models": "models in memory; requests for other models wait for an idle one",
    "kept-tokens": "tokens of conversations kept in the KV cache for their next turn (default: 8192; 0: none)",
}  # fmt: skip


def chat(parser: Parser) -> None:
    parser.take_names("[MODEL]", least=0, about=_MODELS)
    parser.description = "Chat with a model of the outputs folder; a base model continues text."
    add = parser.add_argument
    add("-p", "--prompt", help="answer or continue this text and exit; - reads it from standard input")
    add("--temperature", type=amount, default=0.0, help="sampling temperature; 0: greedy (default)")
    add("--top-k", type=count, default=50, help="sample among the K most likely tokens (default: 50)")
    add("--system", metavar="TEXT", help="system prompt")
    add("--max-tokens", type=positive, default=128, help="longest answer in tokens (default: 128)")
    add("--seed", type=int, default=0)
    add("--bits", type=int, choices=(8, 4), help=_BITS_HELP)


def _chat(options: Namespace) -> int:
    """Answer one question with -p, or chat until /quit."""
    name = next(iter(options.names), None)
    settings = {key: getattr(options, key) for key in ("temperature", "max_tokens", "seed", "system")}
    settings["top_k"] = options.top_k or None
    is_own = not (name and name.startswith(_THIRD_PARTY))
    title, folder = ("", _own(Store(options.outputs), name)) if is_own else _third_party(options, str(name))

    from mlxchat.terminal.chat import Chat  # imports MLX

    if is_own:
        chat = Chat.load(folder, bits=options.bits, **settings)
    else:
        chat = Chat.load_third_party(folder, title, **settings)
    if options.prompt is not None:
        chat.answer_once(options.prompt)
    else:
        chat.converse()
    return 0


def _own(store: Store, name: str | None) -> Path:
    """Return the folder of a model of ours, whole, after printing which one it is."""
    found = find_model(store, name)
    check_model(found.place)
    print(f"model: {describe_model(store, found)}", file=sys.stderr)
    return found.place


def _third_party(options: Namespace, reference: str) -> tuple[str, Path]:
    """Return the name and the folder of a third-party model, which mlx-lm runs."""
    if options.bits:
        raise ConfigError(f"--bits requires a model of mlxchat; mlx-lm runs {reference}")
    from mlxchat.interop.source import outside_folder

    folder, what = outside_folder(reference), reference.removeprefix(_THIRD_PARTY)
    return (folder.resolve().name if folder == Path(what).expanduser() else what), folder


def serve(parser: Parser) -> None:
    parser.take_names("[MODEL…]", least=0, most=None, about=_MODELS)
    parser.description = "Serve the models of the outputs folder and a chat page; the first MODEL is the default."
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1); other addresses require a key")
    add("--port", type=number(0, 65535, whole=True), default=8000, help="port (default: 8000); 0: any free port")
    add("--api-key", metavar="KEY", help=f"key that clients must send; better set in {_KEY}")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="allow requests from pages of this origin")
    add("--temperature", type=number(0, 2), default=0.8, help="default of requests (default: 0.8)")
    add("--top-k", type=count, default=50, help="default of requests (default: 50; 0: off)")
    for name, meaning in _LIMITS.items():
        kind = count if name in ("max-queue", "kept-tokens") else positive
        add(f"--{name}", type=kind, metavar="N", help=meaning)
    add("--bits", type=int, choices=(8, 4), help=_BITS_HELP)


def _serve(options: Namespace) -> int:
    """Serve until a signal arrives."""
    named = options.names
    own = [name for name in named if not name.startswith(_THIRD_PARTY)]
    if len(own) > 1:
        raise ConfigError(f"{', '.join(own)} are given, expected one default model: all models of the store are served")

    from mlxchat.serve.security import is_loopback  # importing FastAPI takes most of a second

    loopback = is_loopback(options.host)
    key = options.api_key or os.environ.get(_KEY) or None
    if not loopback and key is None:
        needed = f"--host {options.host} can be reached from other machines and requires a key: --api-key KEY or {_KEY}"
        raise ConfigError(f"{needed}. Clients send it as Authorization: Bearer KEY")
    from mlxchat.serve.api import Service, make_app, run_server
    from mlxchat.serve.models import Models, load_scheduler, read_model, read_third_party, rows_that_fit
    from mlxchat.serve.requests import Defaults
    from mlxchat.serve.security import Limits
    from mlxchat.serve.worker import Worker

    chosen = {name: getattr(options, name) for name in ("max_rows", "max_queue", "max_models", "kept_tokens")}
    limits = Limits(**{name: value for name, value in chosen.items() if value is not None})
    store = Store(options.outputs)
    third_party: dict[str, Path] = {}
    for reference in named:
        if reference.startswith(_THIRD_PARTY):
            name, folder = _third_party(options, reference)
            read_third_party(name, folder)
            third_party[name] = folder
    if named and named[0] not in own:
        place = next(iter(third_party.values()))
        print(f"model: {next(iter(third_party))} (third-party, by mlx-lm)", file=sys.stderr)
    else:
        place = _own(store, own[0] if own else None)
        read_model(place)
    answering = {"bits": options.bits, "temperature": options.temperature, "top_k": options.top_k}
    models = Models(store, place, answering, third_party=third_party)
    model = models.find(None)
    rows_that_fit(model, limits, bits=options.bits)
    defaults = Defaults(temperature=options.temperature, top_k=options.top_k or None)
    service = Service(models, Worker(limits, partial(load_scheduler, bits=options.bits)), defaults)
    app = make_app(service, api_key=key, loopback_only=loopback and key is None, cors=options.cors)
    return run_server(app, options.host, options.port, name=model.name, key_needed=key is not None)
