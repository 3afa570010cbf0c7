"""Eval: measure a checkpoint on held-out text, a base model on CORE, and one that can chat on the suite of tasks.

Counterpart of nanochat's base_eval.py and chat_eval.py. Settings: `EvalConfig` of config/schema.py,
conf/core/, conf/suite/.
Every finished batch of questions is kept under ctx.work, so that a killed evaluation continues from there.
"""

from collections.abc import Collection, Iterator

from mlxchat.planning.forecast import TASK_METRICS, TEXT_METRICS, eval_memory, has_core, has_corpus
from mlxchat.runner.context import Context
from mlxchat.runner.stage import Metric, Stage


def unread(filled: Collection[str], format: str | None) -> Iterator[str]:
    """Yield the settings that this evaluation does not read: those of chat models, of base models, of the corpus."""
    if format == "base":
        yield from ("suite", "eval.max_new_tokens", "eval.seeds", "eval.temperature", "eval.top_k")
    if format == "chat":
        yield from ("eval.core", "eval.base_tasks")
    if "corpus" not in filled:
        yield "eval.bpb_tokens"


stage = Stage(
    version=9,
    inputs={"checkpoint": "checkpoint"},
    optional_inputs={"corpus": "corpus"},
    produces="scores",
    outputs=["scores.json", "examples.parquet"],
    reads=["suite", "eval"],
    unread=unread,
    metrics=[
        *TEXT_METRICS,
        Metric("core", "maximize", when=has_core, needs="core=nanochat and a base model"),
        *TASK_METRICS,
        Metric("own_*", names=lambda config: config.eval.own),
        Metric("ngram_bpb", when=has_corpus, needs="pipeline.STEP.corpus"),
        Metric("untrained_bpb", when=has_corpus, needs="pipeline.STEP.corpus"),
    ],
    uses_gpu=True,
    memory=eval_memory,
)


def run(ctx: Context) -> None:
    from mlxchat.engine.generate import Engine, answer_prompts, continue_prompts
    from mlxchat.evals.measure import measure, measure_own, write_scores
    from mlxchat.model.checkpoint import load_for_inference
    from mlxchat.ops.device import prepare_machine
    from mlxchat.planning.memory import forward_tokens
    from mlxchat.store.files import Records

    config, machine = ctx.config.eval, ctx.config.machine
    dtype = prepare_machine(machine)
    gpt, tokenizer, facts = load_for_inference(ctx.inputs["checkpoint"], dtype)
    chats = facts["format"] == "chat"
    rows = eval_memory(ctx.config, ctx.stage, gpt.sizes).on(machine).rows(ctx.step)
    engine = Engine(gpt, tokenizer, max_rows=rows, batch_tokens=forward_tokens(machine, gpt.sizes), team=ctx.team)
    scores = measure(ctx, engine, as_base=not chats, as_chat=chats)
    if config.own:
        scores["own"] = measure_own(engine, config.own)
        ctx.metrics |= {f"own_{name}": value for name, value in scores["own"].items()}
    write_scores(ctx, scores)
    if chats:
        samples = answer_prompts(engine, config.prompts, config.max_new_tokens)
    else:
        how = {"temperature": config.temperature or 0.0, "top_k": config.top_k, "seed": ctx.seed("samples")}
        samples = continue_prompts(engine, config.prompts, config.max_new_tokens, **how)
    observed = Records(ctx.out / "samples.jsonl")  # for the report: the prompts are no part of the key
    for prompt, text in samples:
        observed.append({"prompt": prompt, "text": text})
