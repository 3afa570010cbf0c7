"""SFT: supervised fine-tuning on conversations, where only what the assistant says is learnt.

Counterpart of nanochat's scripts/chat_sft.py. Settings: `ConversationConfig` of config/schema.py.
"""

from mlxchat.planning.forecast import conversation_metrics, memory, problems
from mlxchat.runner.context import Context
from mlxchat.runner.stage import CHECKPOINT_FILES, WEIGHTS_OR_ADAPTERS, Stage

stage = Stage(
    version=6,
    inputs={"checkpoint": "checkpoint"},
    produces="checkpoint",
    outputs=[WEIGHTS_OR_ADAPTERS, *CHECKPOINT_FILES],
    reads=["optimizer", "sft", "training"],
    metrics=conversation_metrics("sft"),
    uses_gpu=True,
    seeded="both",
    format="chat",
    memory=memory,
    problems=problems,
)


def run(ctx: Context) -> None:
    from mlxchat.training.finetune import finetune

    finetune(ctx, ctx.config.sft)
