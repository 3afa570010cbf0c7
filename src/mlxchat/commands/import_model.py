"""mlxchat import nanochat|hf|adapter: what another tool made becomes a checkpoint, which import:NAME stands for."""

from __future__ import annotations

import re
from pathlib import Path

from mlxchat.commands.arguments import Parser, outputs_folder, quoted, split_words
from mlxchat.errors import ConfigError, suggest
from mlxchat.store.naming import IMPORTS, find_model, links
from mlxchat.store.store import Store, read_manifest

FORMATS = ("nanochat", "hf", "adapter")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/.+)?")


def main(format_name: str, arguments: list[str]) -> int:
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
