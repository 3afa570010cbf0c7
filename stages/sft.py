"""SFT: supervised fine-tuning on conversations, where only what the assistant says is learnt.

Counterpart of nanochat's scripts/chat_sft.py. Options:
conf/settings/sft.yaml.
"""

from mlxchat.runner.context import Context
from mlxchat.training.finetune import finetune

VERSION = 6
CONFIG = ["optimizer", "sft", "training"]
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
    "ce": "minimize if sft.teacher.is_there",
    "kl": "minimize if sft.teacher.is_there",
    "accuracy_{sft.suite}": "maximize",
    "mean_centered": "maximize if sft.suite",
    "mean_centered_choice": "maximize if sft.suite",
    "truncated_conversations": "minimize",
    "skipped_iterations": "minimize if training.on_nan=skip",
    "tokens_per_second": "maximize",
    "data_wait_frac": "minimize",
}
RESOURCES = ["gpu"]
SEEDED = "both"


def run(ctx: Context) -> None:
    finetune(ctx, ctx.config.sft)
