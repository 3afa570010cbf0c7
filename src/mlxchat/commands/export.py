"""mlxchat export ID --to hf|nanochat|gguf|mlx|mlx-adapter PATH: a checkpoint as another tool reads it; its card."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.config.wording import format_bytes
from mlxchat.errors import ConfigError, StoreError, visible
from mlxchat.store.store import Store, read_manifest
from mlxchat.store.transfer import is_url

if TYPE_CHECKING:
    from mlxchat.interop.exporting import Checkpoint

FORMATS = ("hf", "nanochat", "gguf", "mlx", "mlx-adapter")
_MEASURED_TOKENS = 8192
_WORDS = {
    "hf": "transformers' NanoChatForCausalLM",
    "nanochat": "nanochat's own files",
    "mlx": "mlx-lm",
    "mlx-adapter": "mlx-lm, beside their base",
}


def main(arguments: list[str]) -> int:
    """Export a model to another tool, or artifacts with their closure to a place."""
    parser = make_naming_parser(
        "export",
        "Copy artifacts, and all that they were made from, to a folder (as rsync likes it) or a tar file. "
        "Or, with --to hf, nanochat, gguf or mlx, write one model to PATH as that tool reads it; mlx-adapter: its "
        "adapters alone.",
        "ID",
    )
    parser.usage = (
        "mlxchat export ID… --to PLACE [--public] [outputs=PATH]\n"
        "       mlxchat export ID --to hf|nanochat|gguf|mlx|mlx-adapter PATH [--quantize 4|8]\n"
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
        from mlxchat.commands.transfer import main_export

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
    from mlxchat.store.integrity import find_damage
    from mlxchat.store.naming import find_model
    from mlxchat.store.whole_folder import check_free, whole_folder

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
        print(f"exported {place.name}{f' to {to}' if kept else ''} for {_WORDS[target]} ({size})")
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
        how, notes = _adapter_words(checkpoint)
    else:
        exporting.write_mlx(checkpoint, out, bits=bits, dtype=dtype)
        own = exporting.needs_model_file(checkpoint)
        how = {"trust": " --trust-remote-code" if own else ""}
        if own:
            notes.append(
                "mlx-lm does not know this architecture: the folder has a model file of its own (--trust-remote-code)."
            )
    if checkpoint.bases and target != "mlx-adapter":
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


def _adapter_words(checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Return how adapters and their base are used together, and what is to be told of them."""
    from mlxchat.interop.exporting import needs_model_file

    base, *below = checkpoint.bases
    notes = [
        f"Adapters for {base.name}, whose weights are not among these files: mlxchat export {base.name} --to mlx BASE."
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
