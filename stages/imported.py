"""Imported: converts a third-party model to a checkpoint, which later stages use like one of ours.

Counterpart of nanochat's checkpoint_manager.py. Settings: `ImportConfig` of config/schema.py. Its files are read
without running anything of them, and the artifact is named by their contents: the same wherever they come from.
Adapters that mlx-lm trained on one of our models become adapters of ours; that model is their input.
"""

from mlxchat.runner.context import Context
from mlxchat.runner.stage import CHECKPOINT_FILES, WEIGHTS_OR_ADAPTERS, Metric, Stage

stage = Stage(
    version=2,
    optional_inputs={"checkpoint": "checkpoint"},
    produces="checkpoint",
    outputs=[WEIGHTS_OR_ADAPTERS, *CHECKPOINT_FILES],
    reads=["imported"],
    metrics=[Metric("num_parameters")],
    seeded="no",
    label=lambda config: config.imported.name,
)


def run(ctx: Context) -> None:
    from mlxchat.interop.importing import import_model
    from mlxchat.model.sizes import count_parameters

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop("the download of the model, which is kept as far as it arrived")

    sizes, sources = import_model(ctx.config.imported, ctx.out, check, ctx.inputs.get("checkpoint"))
    ctx.externals += sources
    ctx.derive({"depth": sizes.num_layers, "width": sizes.width, "vocab_size": sizes.vocab_size})
    ctx.metrics["num_parameters"] = count_parameters(sizes)["total"]
