"""Imports third-party models as checkpoints, whose key depends on the contents of the files."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxchat.config.schema import ImportConfig
from mlxchat.errors import DataError
from mlxchat.hub.cache import HubFile, check_space
from mlxchat.interop import hf, nanochat, peft
from mlxchat.interop.names import LATER, sizes_from_hf, sizes_from_nanochat
from mlxchat.interop.source import ModelSource, open_folder, open_repository, read_json
from mlxchat.interop.tensors import read_safetensors, write_safetensors
from mlxchat.interop.torch_files import read_state
from mlxchat.model.checkpoint import write_description
from mlxchat.model.sizes import GPTSizes, count_parameters


def find(config: ImportConfig) -> tuple[ModelSource, nanochat.NanochatFiles | hf.HfFiles | peft.AdapterFiles]:
    """Return where a model is, and its files there; only small ones are downloaded."""
    if config.folder is not None:
        source = open_folder(Path(config.folder))
    else:
        assert config.repository is not None, "composition checks that one of them is given"
        source = open_repository(config.repository, config.revision)
    if config.format == "hf":
        return source, hf.find_files(source)
    if config.format == "adapter":
        return source, peft.find_files(source)
    return source, nanochat.find_files(source, config.step)


def pins_of(config: ImportConfig, hash_of: Callable[[Path], str]) -> dict[str, str]:
    """Return name → sha256 of the files that determine the model; the same for a repository and a folder."""
    source, files = find(config)
    return {f"model {Path(name).name}": source.sha256(name, hash_of) for name in files.identity()}


def model_sizes(config: ImportConfig) -> GPTSizes:
    """Return the sizes of a model without downloading its weights; DataError if there is no sound description."""
    source, files = find(config)
    if isinstance(files, hf.HfFiles):
        return sizes_from_hf(hf.read_config(source), source.where)
    assert isinstance(files, nanochat.NanochatFiles), "adapters do not describe their model"
    return _sizes_of_meta(source.small(files.meta), files.meta)


@lru_cache(maxsize=8)
def _sizes_of_meta(data: bytes, where: str) -> GPTSizes:
    model_config = nanochat.read_meta(data, where)["model_config"]
    # The tensors decide the architecture; here a key that July 2026 added.
    return sizes_from_nanochat(model_config, LATER if "window_pattern" in model_config else (), where)


def files_to_fetch(config: ImportConfig) -> list[HubFile]:
    """Return the files of the Hub that an import reads; none if it is from a folder."""
    source, files = find(config)
    return [file for name in files.all() if isinstance(file := source.files[name], HubFile)]


def import_model(
    config: ImportConfig, out: Path, check: Callable[[], None], base: Path | None = None
) -> tuple[GPTSizes, list[dict[str, Any]]]:
    """Write a third-party model to `out` as a checkpoint; return its sizes and a record of each file.

    `check` is called repeatedly and may raise to end the work. Adapters need the artifact of their `base`. DataError: a
    file is missing, damaged or invalid, or the disk is full; PassingError: the Hub does not answer.
    """
    source, files = find(config)
    if isinstance(files, peft.AdapterFiles):
        sizes = peft.import_adapter(source, files, base, out, chats=config.chat, check=check)
        return sizes, [source.record(name) for name in files.all()]
    if base is not None:
        raise DataError(f"{source.where} is a complete model; only adapters have a base")
    parameters = count_parameters(model_sizes(config))["total"]
    check_space(out, 4 * parameters, f"The checkpoint of {source.where}")
    paths = source.fetch(files.all(), check)
    if isinstance(files, hf.HfFiles):
        about = read_json(paths[files.about_tokenizer], files.about_tokenizer) if files.about_tokenizer else {}
        described = hf.read_config(source)
        shards = [read_safetensors(paths[name]) for name in files.weights]
        sizes, tensors, stored = hf.read_model(shards, described, source.where)
        tokenizer = hf.read_matching_tokenizer(paths[files.tokenizer[0]], sizes)
        template = files.chat_template or about.get("chat_template")
        facts = hf.facts_of(described, chat=bool(template) if config.chat is None else config.chat)
    else:
        meta = nanochat.read_meta(paths[files.meta].read_bytes(), files.meta)
        state = read_state(paths[files.model], files.model)
        sizes, tensors, stored = nanochat.read_model(state, meta, files.model, files.meta)
        tokenizer = hf.read_matching_tokenizer(paths[files.tokenizer], sizes)
        facts = nanochat.facts_of(meta, files, config.chat)
    check()
    arrays = {name: tensor.floats() for name, tensor in sorted(tensors.items())}
    check()
    write_safetensors(out / "model.safetensors", arrays, made_for="mlx")
    facts["imported"] |= stored
    write_description(out, sizes, tokenizer, facts)
    return sizes, [source.record(name) for name in files.all()]
