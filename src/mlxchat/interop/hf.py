"""Reads folders of `NanoChatForCausalLM`, as written by transformers, mlx-lm or mlxchat."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.data.tokenizer import Tokenizer, load_vocabulary
from mlxchat.data.vocabulary import CONFIG_FILE, HF_FILE, RANKS_FILE, check_special_tokens
from mlxchat.errors import DataError
from mlxchat.interop.names import check_tensors, ours_from_hf, sizes_from_hf
from mlxchat.interop.source import ModelSource, read_json
from mlxchat.interop.tensors import Tensor
from mlxchat.model.sizes import GPTSizes

INDEX_FILE = "model.safetensors.index.json"
_CONFIG, _WHOLE, _TEMPLATE = "config.json", "model.safetensors", "chat_template.jinja"


@dataclass(frozen=True)
class HfFiles:
    """The names of a model's files in its source."""

    config: str
    weights: list[str]
    tokenizer: list[str]
    """tokenizer.json, or our tokenizer's files."""
    about_tokenizer: str | None
    """tokenizer_config.json, which may have a chat template."""
    chat_template: str | None
    """chat_template.jinja, written by transformers 5 and mlx_lm.fuse."""

    def identity(self) -> list[str]:
        """Return the names of the files that determine the model."""
        return [self.config, *self.weights, *self.tokenizer, *([self.chat_template] if self.chat_template else [])]

    def all(self) -> list[str]:
        """Return the names of all files that are read."""
        return list(dict.fromkeys([*self.identity(), *([self.about_tokenizer] if self.about_tokenizer else [])]))


def find_files(source: ModelSource) -> HfFiles:
    """Return the files of a model; the weights are not downloaded."""
    if not source.has(_CONFIG):
        raise DataError(
            f"{source.where} has no config.json, so it is not a Hugging Face model. It has {source.listed()}. For a "
            "folder with model_<step>.pt: mlxchat import nanochat"
        )
    check_architecture(read_config(source), source.where)
    weights = sorted(set(_read_index(source).values())) if source.has(INDEX_FILE) else [_WHOLE]
    if missing := [name for name in weights if not source.has(name)]:
        pickled = sorted(name for name in source.files if name.endswith((".bin", ".pt", ".pth")))
        advice = "is a pickle, which is not read: save the model as safetensors with transformers."
        hint = f" {pickled[0]} {advice}" if pickled else ""
        raise DataError(f"{source.where} has no {missing[0]}.{hint}")
    ours = [name for name in (RANKS_FILE, CONFIG_FILE) if source.has(name)]
    if len(ours) < 2 and not source.has(HF_FILE):
        raise DataError(f"{source.where} has no {HF_FILE}. Copy the model's tokenizer there")
    about = CONFIG_FILE if source.has(CONFIG_FILE) else None
    template = _TEMPLATE if source.has(_TEMPLATE) else None
    return HfFiles(_CONFIG, weights, ours if len(ours) == 2 else [HF_FILE], about, template)


def read_config(source: ModelSource) -> dict[str, Any]:
    """Return config.json."""
    return read_json(source.small(_CONFIG), f"{source.where}: config.json")


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Check that the model is nanochat's."""
    kind = config.get("model_type")
    if kind != "nanochat":
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and names else kind
        raise DataError(
            f"{where} is a {name} (model_type {kind}), not a nanochat model, so it cannot be imported and trained. "
            "mlxchat runs it with mlx-lm:\n"
            "  evaluate  mlxchat pipeline=outside outside.path=FOLDER outside.name=NAME\n"
            "  chat      mlxchat chat hf:FOLDER   (or hf:ORGANISATION/NAME)\n"
            "  distil    mlxchat stage=sft sft.teacher.path=FOLDER (same tokenizer), or its answers: mlxchat distill\n"
            "Download a repository to a folder: mlxchat data fetch ORGANISATION/NAME --model"
        )


def facts_of(config: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """Return the contents of checkpoint.json for a model."""
    name = str(config.get("_name_or_path") or "")
    return {
        "stage": "imported",
        "format": "chat" if chat else "base",
        "imported": {"format": "hf", **({"name": name} if name else {})},
    }


def read_model(
    files: Iterable[Mapping[str, Tensor]], config: Mapping[str, Any], where: str
) -> tuple[GPTSizes, dict[str, Tensor], dict[str, Any]]:
    """Return the sizes, the tensors by our names, and stored facts: `dtypes` other than float32."""
    sizes = sizes_from_hf(config, f"{where}: config.json")
    named = [(name, ours_from_hf(name), tensor) for file in files for name, tensor in file.items()]
    fault = f"{where}: the weights do not match config.json"
    check_tensors(((name, ours, tensor.shape) for name, ours, tensor in named), sizes, fault)
    tensors = {ours: tensor for _, ours, tensor in named if ours is not None}
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items() if tensor.dtype.name != "float32"}
    return sizes, tensors, {"dtypes": dict(sorted(dtypes.items()))}


def read_matching_tokenizer(path: Path, sizes: GPTSizes) -> Tokenizer:
    """Return the tokenizer of a model, which may be nanochat's tokenizer.pkl, with its ids."""
    # Our own tokenizer is a folder.
    tokenizer, keeps_ids = load_vocabulary(str(path.parent if path.name == RANKS_FILE else path))
    if path.name == HF_FILE:
        added = read_json(path, path.name).get("added_tokens") or []
        check_special_tokens({token["content"]: token["id"] for token in added}, len(tokenizer.ranks), path.name)
    if not keeps_ids:
        raise DataError(f"{path.name}: its tokens cannot keep their ids here, which the model's embedding needs")
    if tokenizer.vocab_size != sizes.vocab_size:
        raise DataError(
            f"{path.name} has {tokenizer.vocab_size:,} tokens, the model {sizes.vocab_size:,}: it is the tokenizer of "
            "another model. Copy the right one to the model"
        )
    return tokenizer


def _read_index(source: ModelSource) -> dict[str, str]:
    index = read_json(source.small(INDEX_FILE), f"{source.where}: {INDEX_FILE}").get("weight_map")
    is_plain = isinstance(index, dict) and all(isinstance(name, str) and "/" not in name for name in index.values())
    if not isinstance(index, dict) or not index or not is_plain:
        raise DataError(f"{source.where}: {INDEX_FILE} has no valid weight_map")
    return index
