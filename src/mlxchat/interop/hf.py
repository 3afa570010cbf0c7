"""A folder of `NanoChatForCausalLM`, as Hugging Face's transformers, mlx-lm or mlxchat write it, under our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlxchat.data.tokenizer import Tokenizer, load_vocabulary
from mlxchat.data.vocabulary import CONFIG_FILE, HF_FILE, RANKS_FILE, check_special_tokens
from mlxchat.errors import DataError
from mlxchat.interop.names import check_tensors, expected_shapes, ours_from_hf, sizes_from_hf
from mlxchat.interop.source import ModelSource, read_json
from mlxchat.interop.tensors import SafeTensor, SafetensorsFile
from mlxchat.model.sizes import GPTSizes

INDEX_FILE = "model.safetensors.index.json"
_CONFIG, _WHOLE, _TEMPLATE = "config.json", "model.safetensors", "chat_template.jinja"


@dataclass(frozen=True)
class HfFiles:
    """The names of a model's files in its source."""

    config: str
    weights: list[str]
    tokenizer: list[str]
    """tokenizer.json, or the files of ours."""
    about_tokenizer: str | None
    """tokenizer_config.json, which may hold a chat template."""
    chat_template: str | None
    """chat_template.jinja, where transformers 5 and mlx_lm.fuse write it."""

    def identity(self) -> list[str]:
        """Return the names of those that the model is made of."""
        return [self.config, *self.weights, *self.tokenizer, *([self.chat_template] if self.chat_template else [])]

    def all(self) -> list[str]:
        """Return the names of those that are read."""
        return list(dict.fromkeys([*self.identity(), *([self.about_tokenizer] if self.about_tokenizer else [])]))


def find_files(source: ModelSource) -> HfFiles:
    """Return the files of a model; of the weights nothing is fetched.

    Raises:
        DataError: there is none, it is of another architecture, or a file is missing.
    """
    if not source.has(_CONFIG):
        raise DataError(
            f"{source.where} holds no config.json, so it is no model of Hugging Face's. It holds "
            f"{source.listed()}. For a folder with model_<step>.pt: mlxchat import nanochat"
        )
    check_architecture(read_config(source), source.where)
    weights = sorted(set(_read_index(source).values())) if source.has(INDEX_FILE) else [_WHOLE]
    missing = [name for name in weights if not source.has(name)]
    if missing:
        pickled = sorted(name for name in source.files if name.endswith((".bin", ".pt", ".pth")))
        hint = (
            f" {pickled[0]} is a pickle, which is not read: have transformers save it as safetensors."
            if pickled
            else ""
        )
        raise DataError(f"{source.where} has no {missing[0]}.{hint}")
    ours = [name for name in (RANKS_FILE, CONFIG_FILE) if source.has(name)]
    if len(ours) < 2 and not source.has(HF_FILE):
        raise DataError(f"{source.where} has no {HF_FILE}. A model without its tokenizer is of no use; copy it there")
    about = CONFIG_FILE if source.has(CONFIG_FILE) else None
    template = _TEMPLATE if source.has(_TEMPLATE) else None
    return HfFiles(_CONFIG, weights, ours if len(ours) == 2 else [HF_FILE], about, template)


def read_config(source: ModelSource) -> dict[str, Any]:
    """Return config.json.

    Raises:
        DataError: it is damaged.
    """
    return read_json(source.small(_CONFIG), f"{source.where}: config.json")


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Refuse architectures that ours are not.

    Raises:
        DataError: with what such a model can be used for all the same.
    """
    kind = config.get("model_type")
    if kind != "nanochat":
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and names else kind
        raise DataError(
            f"{where} is a {name} (model_type {kind}), no model of nanochat's, so it cannot become a checkpoint "
            "that is trained here. mlx-lm runs it as it is:\n"
            "  evaluate  mlxchat pipeline=outside outside.path=FOLDER outside.name=NAME\n"
            "  chat      mlxchat chat --model hf:FOLDER   (or hf:ORGANISATION/NAME)\n"
            "  learn     mlxchat stage=sft sft.teacher.path=FOLDER (equal tokens); its answers: mlxchat distill\n"
            "A repository comes into a folder by: mlxchat data fetch ORGANISATION/NAME --model"
        )


def facts_of(config: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """Return the contents of checkpoint.json for a model.

    Args:
        config: config.json.
        chat: whether it has learnt to chat.
    """
    name = str(config.get("_name_or_path") or "")
    return {
        "stage": "imported",
        "format": "chat" if chat else "base",
        "imported": {"format": "hf", **({"name": name} if name else {})},
    }


def read_model(
    files: Mapping[str, SafetensorsFile], config: Mapping[str, Any], where: str
) -> tuple[GPTSizes, dict[str, tuple[SafetensorsFile, SafeTensor]], dict[str, Any]]:
    """Return the sizes, the tensors under our names, and how they were stored: `dtypes` but float32.

    Raises:
        DataError: they are not those that config.json describes.
    """
    sizes = sizes_from_hf(config, f"{where}: config.json")
    named = [(name, ours_from_hf(name), file, each) for file in files.values() for name, each in file.tensors.items()]
    fault = f"{where}: the weights are not what config.json describes"
    check_tensors(((name, ours, each.shape) for name, ours, _, each in named), sizes, fault)
    found = {ours: (file, each) for _, ours, file, each in named if ours is not None}
    dtypes = {name: each.dtype.name for name, (_, each) in found.items() if each.dtype.name != "float32"}
    return sizes, {name: found[name] for name in expected_shapes(sizes)}, {"dtypes": dict(sorted(dtypes.items()))}


def read_matching_tokenizer(paths: Mapping[str, Path], files: HfFiles, sizes: GPTSizes) -> Tokenizer:
    """Return the tokenizer, with the same ids as the source's.

    Raises:
        DataError: it is damaged, encodes otherwise than ours would, or is another model's.
    """
    path = paths[files.tokenizer[0]]
    tokenizer, keeps_ids = load_vocabulary(str(path if path.name == HF_FILE else path.parent))
    if path.name == HF_FILE:
        check_added_tokens(path, tokenizer)
    if tokenizer.vocab_size != sizes.vocab_size or not keeps_ids:
        raise DataError(
            f"{PurePosixPath(files.tokenizer[0]).name} has {tokenizer.vocab_size:,} tokens, the model "
            f"{sizes.vocab_size:,}: it is the tokenizer of another model"
        )
    return tokenizer


def check_added_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer.json whose special tokens are not nanochat's, after all others.

    Raises:
        DataError: naming the first that differs.
    """
    added = read_json(path, path.name).get("added_tokens") or []
    check_special_tokens({token["content"]: token["id"] for token in added}, len(tokenizer.ranks), path.name)


def _read_index(source: ModelSource) -> dict[str, str]:
    index = read_json(source.small(INDEX_FILE), f"{source.where}: {INDEX_FILE}").get("weight_map")
    plain = isinstance(index, dict) and all(isinstance(name, str) and "/" not in name for name in index.values())
    if not plain or not index:
        raise DataError(f"{source.where}: {INDEX_FILE} does not say in which files the weights are")
    assert isinstance(index, dict)
    return index
