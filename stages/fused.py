"""Fused: a model whose adapters are put into the weights below them, so that it needs no other artifact to be used.

With QLoRA, the rounded numbers of the base go in, in float32, since the adapters were trained on these.
"""

from mlxchat.runner.context import Context
from mlxchat.runner.stage import CHECKPOINT_FILES, Metric, Stage

stage = Stage(
    version=1,
    inputs={"checkpoint": "checkpoint"},
    produces="checkpoint",
    outputs=["model.safetensors", *CHECKPOINT_FILES],
    metrics=[Metric("num_parameters")],
    seeded="no",
)


def run(ctx: Context) -> None:
    from mlxchat.errors import DataError
    from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
    from mlxchat.model.sizes import count_parameters
    from mlxchat.store.catalog import is_adapter

    folder = ctx.inputs["checkpoint"]
    if not is_adapter(folder):
        raise DataError(f"{folder.name} has all of its weights already: there are no adapters to fuse")
    model, tokenizer, facts = load_checkpoint(folder)
    ctx.metrics["num_parameters"] = count_parameters(model.sizes)["total"]
    save_checkpoint(ctx.out, model, tokenizer, facts)
