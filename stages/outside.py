"""Outside: measure a third-party model as ours are measured, so that both stand in one table.

Any folder that mlx-lm opens. Options: conf/settings/outside.yaml, conf/settings/eval.yaml, conf/core/, conf/suite/.
"""

from pathlib import Path

from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.evals.language_model import LanguageModel
from mlxchat.evals.measure import measure, write_scores
from mlxchat.ops.device import prepare_machine
from mlxchat.runner.context import Context

VERSION = 5
CONFIG = ["outside", "suite", "eval"]
READS_IF = {"eval.bpb_tokens": "corpus", "eval.seeds": "never", "eval.temperature": "never", "eval.top_k": "never"}
INPUTS: dict[str, str] = {}
OPTIONAL_INPUTS = {"corpus": "corpus"}
PRODUCES = "scores"
OUTPUTS = ["scores.json", "examples.parquet"]
METRICS = {
    "val_bpb": "minimize if corpus",
    "perplexity": "minimize if corpus",
    "text_bpb": "minimize if eval.text",
    "text_perplexity": "minimize if eval.text",
    "core": "maximize if eval.core and not eval.core.tasks",
    "{suite}": "maximize",
    "{eval.base_tasks}": "maximize",
    "mean_centered": "maximize if suite",
    "chatcore": "maximize if chatcore",
}
RESOURCES = ["gpu"]
LABEL = "outside.name"

# nanochat's.
_MOST_CONTEXT_TOKENS = 2048


def run(ctx: Context) -> None:
    config = ctx.config.outside
    assert config.path is not None  # validated while planning
    prepare_machine(ctx.config.machine)
    engine = ThirdPartyEngine.load(Path(config.path))
    engine.context_tokens = config.context_tokens or min(engine.context_tokens, _MOST_CONTEXT_TOKENS)
    chats = engine.tokenizer.has_chat_template if config.chat is None else config.chat
    scores = measure(ctx, LanguageModel(engine), as_base=True, as_chat=chats)
    about = {"name": config.name, "model_type": engine.model_type, "context_tokens": engine.context_tokens}
    write_scores(ctx, {"checkpoint": config.name, "outside": about, **scores})
