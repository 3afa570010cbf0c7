"""Imported: converts a third-party model to a checkpoint, which later stages use like one of ours.

Counterpart of nanochat's checkpoint_manager.py. Options: conf/settings/imported.yaml. Its files are read without
running anything of them, and the artifact is named by their contents: the same wherever they come from. Adapters that
mlx-lm trained on one of our models become adapters of ours; that model is their input.
"""

from mlxchat.interop.importing import import_model
from mlxchat.model.sizes import count_parameters
from mlxchat.runner.context import Context

VERSION = 2
CONFIG = ["imported"]
INPUTS: dict[str, str] = {}
OPTIONAL_INPUTS = {"checkpoint": "checkpoint"}
PRODUCES = "checkpoint"
OUTPUTS = [
    "model.safetensors|adapters.safetensors",
    "config.json",
    "checkpoint.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
METRICS = {"num_parameters": "neither"}
LABEL = "imported.name"
SEEDED = False


def run(ctx: Context) -> None:
    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop("the download of the model, which is kept as far as it arrived")

    sizes, sources = import_model(ctx.config.imported, ctx.out, check, ctx.inputs.get("checkpoint"))
    ctx.externals += sources
    ctx.derive({"depth": sizes.num_layers, "width": sizes.width, "vocab_size": sizes.vocab_size})
    ctx.metrics["num_parameters"] = count_parameters(sizes)["total"]
