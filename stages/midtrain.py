"""Midtrain: go on from the base model with conversations, so that it learns their form, choices and tools.

Counterpart of nanochat's scripts/mid_train.py (with its schedule the right way round). Options:
conf/settings/midtrain.yaml.
"""

from mlxchat.runner.context import Context
from mlxchat.training.finetune import finetune

VERSION = 6
CONFIG = ["optimizer", "midtrain", "training"]
INPUTS = {"checkpoint": "checkpoint"}
PRODUCES = "checkpoint"
FORECAST = "mlxchat.training.forecast"
FORMAT = "chat"
OUTPUTS = [
    "model.safetensors|adapters.safetensors",
    "config.json",
    "checkpoint.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
METRICS = {
    "val_loss": "minimize while training",
    "loss": "minimize while training",
    "ce": "minimize if midtrain.teacher.is_there",
    "kl": "minimize if midtrain.teacher.is_there",
    "accuracy_{midtrain.suite}": "maximize",
    "mean_centered": "maximize if midtrain.suite",
    "mean_centered_choice": "maximize if midtrain.suite",
    "truncated_conversations": "minimize",
    "skipped_iterations": "minimize if training.on_nan=skip",
    "tokens_per_second": "maximize",
    "data_wait_frac": "minimize",
}
RESOURCES = ["gpu"]
SEEDED = "both"


def run(ctx: Context) -> None:
    finetune(ctx, ctx.config.midtrain)
