"""An artifact of the outputs folder, as a notebook uses it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import DataError
from mlxchat.store.files import Records
from mlxchat.store.manifest import Manifest, read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlxchat.engine.generate import Engine
    from mlxchat.model.gpt import GPT


@dataclass(frozen=True)
class Artifact:
    """What a step made."""

    path: Path
    """Its folder."""

    @cached_property
    def manifest(self) -> Manifest:
        """How it was made: config, inputs, metrics, code, environment."""
        return read_manifest(self.path)

    @property
    def metrics(self) -> dict[str, float]:
        """The step's final numbers."""
        return dict(self.manifest["metrics"])

    @property
    def config(self) -> dict[str, Any]:
        """The settings that it was made with, by section."""
        return dict(self.manifest["full_config"])

    def curves(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Return metric → iterations and values, both of shape (N,), recorded while it was made."""
        import numpy as np

        points = defaultdict[str, list[tuple[int, float]]](list)
        for record in Records(self.path / "metrics.jsonl").read():
            for name, value in record.items():
                if name != "iteration" and "iteration" in record and isinstance(value, int | float):
                    points[name].append((record["iteration"], value))
        return {
            name: (np.array([at for at, _ in found]), np.array([value for _, value in found], dtype=np.float64))
            for name, found in points.items()
        }

    @cached_property
    def engine(self) -> Engine:
        """The checkpoint's model in the default device's dtype, with its tokenizer, for generation."""
        from mlxchat.engine.generate import Engine
        from mlxchat.model.checkpoint import load_for_inference

        if self.manifest["kind"] != "checkpoint":
            raise DataError(f"{self.path.name} is a {self.manifest['kind']}, no model")
        model, tokenizer, _ = load_for_inference(self.path)
        return Engine(model, tokenizer)

    def model(self) -> GPT:
        """Return the checkpoint's model: `model(ids)` maps ids (B, T) to logits (B, T, V)."""
        model: GPT = self.engine.model
        return model

    def chat(self, question: str, *, max_new_tokens: int = 256) -> str:
        """Return a chat model's greedy answer."""
        from mlxchat.engine.generate import answer_prompts

        return answer_prompts(self.engine, [question], max_new_tokens)[0][1]

    def generate(self, prompt: str, *, max_new_tokens: int = 64, **sampling: Any) -> str:
        """Return the continuation of a text; `sampling` is that of `Engine.complete` (default: greedy)."""
        from mlxchat.engine.generate import continue_prompts

        return continue_prompts(self.engine, [prompt], max_new_tokens, **sampling)[0][1]


def open_artifact(name: str, outputs: str | Path = "outputs") -> Artifact:
    """Return an artifact by any name that `mlxchat show` accepts (sft, RUN/STEP, STEP@N, an id); else a StoreError."""
    return Artifact(resolve(Store(Path(outputs)), name))
