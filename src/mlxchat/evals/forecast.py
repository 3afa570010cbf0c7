"""What is known of an evaluation before it runs: its memory and its metrics."""

from __future__ import annotations

from mlxchat.config.schema import Config
from mlxchat.evals.scores import chatcore_set
from mlxchat.model.sizes import GPTSizes
from mlxchat.planning.memory import Decoding
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import Metric


def memory(config: Config, stage: str, sizes: GPTSizes) -> Decoding:
    """Return the decoding whose memory to predict; prompts are cropped to the context."""
    return Decoding(
        sizes=sizes,
        row_tokens=sizes.context_tokens + config.eval.max_new_tokens,
        remedies=("a smaller eval.max_new_tokens",),
    )


def has_corpus(step: PlannedStep) -> bool:
    """Return True if the step evaluates held-out text of a corpus."""
    return "corpus" in step.inputs


def has_text(step: PlannedStep) -> bool:
    """Return True if the step evaluates a text of the user's."""
    return step.config.eval.text is not None


def has_core(step: PlannedStep) -> bool:
    """Return True if the step measures the whole of CORE."""
    core = step.config.eval.core
    return step.format != "chat" and core is not None and not core.tasks


def has_suite(step: PlannedStep) -> bool:
    """Return True if the step measures tasks of the suite."""
    return step.format != "base" and bool(step.config.suite)


def has_chatcore(step: PlannedStep) -> bool:
    """Return True if the suite has all tasks of ChatCORE."""
    tasks = {item.task for item in step.config.suite.values() if item.split == "test"}
    return has_suite(step) and chatcore_set(tasks) is not None


TEXT_METRICS = (
    Metric("val_bpb", "minimize", when=has_corpus, needs="pipeline.STEP.corpus"),
    Metric("perplexity", "minimize", when=has_corpus, needs="pipeline.STEP.corpus"),
    Metric("text_bpb", "minimize", when=has_text, needs="eval.text"),
    Metric("text_perplexity", "minimize", when=has_text, needs="eval.text"),
)
TASK_METRICS = (
    Metric("*", "maximize", names=lambda config: config.suite, when=has_suite, needs="a chat model and the suite"),
    Metric(
        "*",
        "maximize",
        names=lambda config: config.eval.base_tasks,
        when=lambda step: step.format != "chat",
        needs="a base model and eval.base_tasks",
    ),
    Metric("mean_centered", "maximize", when=has_suite, needs="a chat model and a suite"),
    Metric("chatcore", "maximize", when=has_chatcore, needs="a chat model and suite=chatcore"),
)
