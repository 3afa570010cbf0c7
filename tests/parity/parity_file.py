"""A file of values that nanochat computed, and the tokenizer and models that belong to it."""

import base64
import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from comparison import UnreadableError
from safetensors import SafetensorError, safe_open

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import ArchitectureConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes

FOLDER = Path(os.environ.get("MLXCHAT_PARITY") or Path(__file__).resolve().parents[3] / "shared" / "parity")
"""The folder of nanochat's values; the environment variable MLXCHAT_PARITY names another one."""

# The names that the files use for the snapshots of nanochat.
_VARIANTS = {"oct": "oct2025", "oct2025": "oct2025", "head": "jul2026", "jul2026": "jul2026"}


class ParityFile:
    """One file, read at most once, with access to the tokenizer and the models of its set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind = path.name.partition("_")[0].partition(".")[0]

    @cached_property
    def json(self) -> Any:
        """The content of a JSON file, {} of another one."""
        if self.path.suffix != ".json":
            return {}
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{self.path}: cannot be read as JSON ({_reason(error)})") from None

    @cached_property
    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        return self._safetensors[1]

    @cached_property
    def metadata(self) -> dict[str, str]:
        return self._safetensors[0]

    @cached_property
    def _safetensors(self) -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]:
        try:
            with safe_open(self.path, "np") as file:
                return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise UnreadableError(f"{self.path}: cannot be read as safetensors ({_reason(error)})") from None

    def companion(self, stem: str, suffix: str) -> "ParityFile":
        """Return another file of the same set, such as `tokenizer`, '.json' of engine_b.json: tokenizer_b.json.

        Its name ends as this file's does, or is the one that this file's `about` mentions. It is looked for beside
        this file first, and then in `FOLDER`.

        Raises:
            UnreadableError: it is missing.
        """
        ends = [self.path.stem.rpartition("_")[2], self.path.stem.partition("_")[2]]
        names = [f"{stem}_{end}{suffix}" for end in ends]
        names += re.findall(rf"\b{stem}_[A-Za-z0-9]+{re.escape(suffix)}", str(self.json.get("about", "")))
        for folder in (self.path.parent, FOLDER):
            for name in names:
                if (folder / name).is_file():
                    return ParityFile(folder / name)
        raise UnreadableError(f"{self.path}: needs {names[0]}, which is not beside it")

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of this file's set (of the file itself, if it is one)."""
        file = self if self.kind == "tokenizer" else self.companion("tokenizer", ".json")
        return Tokenizer(
            {base64.b64decode(token): rank for rank, token in enumerate(file.json["mergeable_ranks_base64"])}
        )

    def core_model(self, variant: str) -> GPT:
        """Return the tiny trained model of one snapshot from this file's set."""
        stem = "core_model" if variant == "oct2025" else f"core_model_{variant}"
        return self.companion(stem, ".safetensors").model("")

    @cached_property
    def variant(self) -> str:
        """The snapshot of a model, oct2025 or jul2026: from the metadata, or else from the names of the weights."""
        said = self.metadata.get("variant")
        if said is None:
            return "jul2026" if any(name.endswith("resid_lambdas") for name in self.tensors) else "oct2025"
        return _VARIANTS[said]

    @cached_property
    def sizes(self) -> GPTSizes:
        """The sizes of a model as ours, from the metadata, which names them as nanochat does."""
        config = json.loads(self.metadata["config"])
        features = architecture_features(self.variant)
        if "window_pattern" in config:
            features["window_pattern"] = config["window_pattern"]
        return GPTSizes(
            vocab_size=int(config["vocab_size"]), num_layers=int(config["n_layer"]), num_heads=int(config["n_head"]),
            num_kv_heads=int(config["n_kv_head"]), width=int(config["n_embd"]),
            context_tokens=int(config["sequence_len"]), **features,
        )  # fmt: skip

    def weights(self, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the tensors under a prefix."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def model(self, prefix: str) -> GPT:
        """Return a model with the weights under a prefix, which must have its names and shapes."""
        model, weights = GPT(self.sizes), self.weights(prefix)
        wanted = {name: value.shape for name, value in flatten_parameters(model).items()}
        found = {name: value.shape for name, value in weights.items()}
        if wanted != found:
            differing = sorted(name for name, _ in wanted.items() ^ found.items())
            raise UnreadableError(
                f"{self.path}: {prefix}{differing[0]} does not fit a {self.variant} model of these sizes"
            )
        set_parameters(model, {name: mx.array(value) for name, value in weights.items()})
        return model


def architecture_features(variant: str) -> dict[str, Any]:
    """Return the settings of conf/architecture for a snapshot, as fields of GPTSizes."""
    architecture: ArchitectureConfig = compose_config([f"architecture={variant}"]).config.architecture
    features = {
        key: value for key, value in vars(architecture).items() if key not in ("name", "whole_heads", "dropout")
    }
    return {"architecture": architecture.name, **features}


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
