"""SFT: supervised fine-tuning on conversations, where only what the assistant says is learnt.

Counterpart of nanochat's scripts/chat_sft.py. Options:
conf/settings/sft.yaml.
"""

from mlxchat.runner.context import Context
from mlxchat.training.finetune import finetune

VERSION = 2
CONFIG = ["optimizer", "sft", "training"]
INPUTS = {"checkpoint": "checkpoint"}
PRODUCES = "checkpoint"
OUTPUTS = [
    "model.safetensors|adapters.safetensors",
    "config.json",
    "checkpoint.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    finetune(ctx, ctx.config.sft)
