"""Outside: measure a third-party model as ours are measured, so that both stand in one table.

Any folder that mlx-lm opens. Settings: `OutsideConfig` and
`EvalConfig` of config/schema.py, conf/core/, conf/suite/.
"""

from pathlib import Path

from mlxchat.planning.forecast import TASK_METRICS, TEXT_METRICS, has_core
from mlxchat.runner.context import Context
from mlxchat.runner.stage import Metric, Stage

# nanochat's.
_MOST_CONTEXT_TOKENS = 2048
NEVER_READ = ("eval.seeds", "eval.temperature", "eval.top_k")

stage = Stage(
    version=5,
    optional_inputs={"corpus": "corpus"},
    produces="scores",
    outputs=["scores.json", "examples.parquet"],
    reads=["outside", "suite", "eval"],
    unread=lambda filled, format: [*NEVER_READ, *(() if "corpus" in filled else ["eval.bpb_tokens"])],
    metrics=[*TEXT_METRICS, Metric("core", "maximize", when=has_core, needs="core=nanochat"), *TASK_METRICS],
    uses_gpu=True,
    label=lambda config: config.outside.name,
)


def run(ctx: Context) -> None:
    from mlxchat.engine.third_party import ThirdPartyEngine
    from mlxchat.evals.measure import measure, write_scores
    from mlxchat.ops.device import prepare_machine

    config = ctx.config.outside
    assert config.path is not None  # validated while planning
    prepare_machine(ctx.config.machine)
    engine = ThirdPartyEngine.load(Path(config.path))
    engine.context_tokens = config.context_tokens or min(engine.context_tokens, _MOST_CONTEXT_TOKENS)
    chats = engine.tokenizer.has_chat_template if config.chat is None else config.chat
    scores = measure(ctx, engine, as_base=True, as_chat=chats)
    about = {"name": config.name, "model_type": engine.model_type, "context_tokens": engine.context_tokens}
    write_scores(ctx, {"checkpoint": config.name, "outside": about, **scores})
