"""Imports third-party models as checkpoints, whose key depends on the contents of the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxchat.config.schema import ImportConfig
from mlxchat.errors import ConfigError, DataError
from mlxchat.hub.cache import HubFile, check_space
from mlxchat.interop import hf, nanochat, peft
from mlxchat.interop.names import LATER, sizes_from_hf, sizes_from_nanochat
from mlxchat.interop.source import ModelSource, open_folder, open_repository, read_json
from mlxchat.interop.tensors import read_safetensors, write_safetensors
from mlxchat.interop.torch_files import read_state
from mlxchat.model.checkpoint import write_description
from mlxchat.model.sizes import GPTSizes, count_parameters


@dataclass(frozen=True)
class Found:
    """A model's files in its source."""

    source: ModelSource
    files: nanochat.NanochatFiles | hf.HfFiles | peft.AdapterFiles


def find(config: ImportConfig) -> Found:
    """Return the files of a model; only small ones are downloaded."""
    if config.folder is not None and config.repository is None:
        source = open_folder(Path(config.folder))
    elif config.repository is not None and config.folder is None:
        source = open_repository(config.repository, config.revision)
    else:
        raise ConfigError("exactly one of imported.repository and imported.folder must be set")
    if config.format == "hf":
        return Found(source, hf.find_files(source))
    if config.format == "adapter":
        return Found(source, peft.find_files(source))
    return Found(source, nanochat.find_files(source, config.step))


def pins_of(config: ImportConfig, hash_of: Callable[[Path], str]) -> dict[str, str]:
    """Return name → sha256 of the files that determine the model; the same for a repository and a folder."""
    found = find(config)
    return {f"model {Path(name).name}": found.source.sha256(name, hash_of) for name in found.files.identity()}


def model_sizes(config: ImportConfig) -> GPTSizes:
    """Return the sizes of a model without downloading its weights.

    Raises:
        DataError: the model does not exist, or its description is damaged.
    """
    found = find(config)
    if isinstance(found.files, hf.HfFiles):
        return sizes_from_hf(hf.read_config(found.source), found.source.where)
    assert isinstance(found.files, nanochat.NanochatFiles), "adapters do not describe their model"
    return _sizes_of_meta(found.source.small(found.files.meta), found.files.meta)


@lru_cache(maxsize=8)
def _sizes_of_meta(data: bytes, where: str) -> GPTSizes:
    model_config = nanochat.read_meta(data, where)["model_config"]
    # The tensors decide the architecture; here a key that July 2026 added.
    return sizes_from_nanochat(model_config, LATER if "window_pattern" in model_config else (), where)


def files_to_fetch(config: ImportConfig) -> list[HubFile]:
    """Return the files of the Hub that an import reads; none if it is from a folder."""
    found = find(config)
    return [file for name in found.files.all() if isinstance(file := found.source.files[name], HubFile)]


def import_model(
    config: ImportConfig, out: Path, check: Callable[[], None], base: Path | None = None
) -> tuple[GPTSizes, list[dict[str, Any]]]:
    """Write a third-party model to `out` as a checkpoint; return its sizes and a record of each file.

    `check` is called repeatedly and may raise to end the work.
    Adapters need the artifact of their `base`.

    Raises:
        DataError: a file is missing, damaged or invalid, or the disk is full.
        PassingError: the Hub does not answer.
    """
    found = find(config)
    source, files = found.source, found.files
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
        tokenizer = hf.read_matching_tokenizer(paths, files, sizes)
        template = files.chat_template or about.get("chat_template")
        facts = hf.facts_of(described, chat=bool(template) if config.chat is None else config.chat)
    else:
        meta = nanochat.read_meta(paths[files.meta].read_bytes(), files.meta)
        state = read_state(paths[files.model], files.model)
        sizes, tensors, stored = nanochat.read_model(state, meta, files.model, files.meta)
        tokenizer = nanochat.read_matching_tokenizer(paths, files, sizes)
        facts = nanochat.facts_of(meta, files, config.chat)
    check()
    arrays = {name: tensor.floats() for name, tensor in sorted(tensors.items())}
    check()
    write_safetensors(out / "model.safetensors", arrays, made_for="mlx")
    facts["imported"] |= stored
    write_description(out, sizes, tokenizer, facts)
    return sizes, [source.record(name) for name in files.all()]
