"""Eval: measure a checkpoint on held-out text, a base model on CORE, and one that can chat on the suite of tasks.

Counterpart of nanochat's base_eval.py and chat_eval.py. Options: conf/settings/eval.yaml, conf/core/, conf/suite/.
Every finished batch of questions is kept under ctx.work, so that a killed evaluation continues from there.
"""

from mlxchat.engine.generate import Engine
from mlxchat.evals.forecast import memory
from mlxchat.evals.language_model import LanguageModel
from mlxchat.evals.measure import measure, measure_own, write_scores
from mlxchat.evals.samples import answer_prompts, continue_prompts
from mlxchat.model.checkpoint import load_for_inference
from mlxchat.ops.device import prepare_machine
from mlxchat.planning.memory import forward_tokens
from mlxchat.runner.context import Context
from mlxchat.store.files import Records

VERSION = 9
CONFIG = ["suite", "eval"]
READS_IF = {
    "suite": "chat",
    "eval.max_new_tokens": "chat",
    "eval.seeds": "chat",
    "eval.temperature": "chat",
    "eval.top_k": "chat",
    "eval.core": "base",
    "eval.base_tasks": "base",
    "eval.bpb_tokens": "corpus",
}
INPUTS = {"checkpoint": "checkpoint"}
OPTIONAL_INPUTS = {"corpus": "corpus"}
PRODUCES = "scores"
FORECAST = "mlxchat.evals.forecast"
OUTPUTS = ["scores.json", "examples.parquet"]
METRICS = {
    "val_bpb": "minimize if corpus",
    "perplexity": "minimize if corpus",
    "text_bpb": "minimize if eval.text",
    "text_perplexity": "minimize if eval.text",
    "core": "maximize if base and eval.core and not eval.core.tasks",
    "{suite}": "maximize if chat",
    "{eval.base_tasks}": "maximize if base",
    "own_{eval.own}": "neither",
    "mean_centered": "maximize if chat and suite",
    "chatcore": "maximize if chat and chatcore",
    "ngram_bpb": "neither if corpus",
    "untrained_bpb": "neither if corpus",
}
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    config, machine = ctx.config.eval, ctx.config.machine
    dtype = prepare_machine(machine)
    gpt, tokenizer, facts = load_for_inference(ctx.inputs["checkpoint"], dtype)
    chats = facts["format"] == "chat"
    rows = memory(ctx.config, ctx.stage, gpt.sizes).on(machine).rows(ctx.step)
    engine = Engine(gpt, tokenizer, max_rows=rows, team=ctx.team)
    model = LanguageModel(engine, batch_tokens=forward_tokens(machine, gpt.sizes))
    scores = measure(ctx, model, as_base=not chats, as_chat=chats)
    if config.own:
        scores["own"] = measure_own(engine, config.own)
        ctx.metrics |= {f"own_{name}": value for name, value in scores["own"].items()}
    write_scores(ctx, scores)
    if chats:
        samples = answer_prompts(engine, config.prompts, config.max_new_tokens)
    else:
        samples = continue_prompts(
            engine,
            config.prompts,
            config.max_new_tokens,
            temperature=config.temperature or 0.0,
            top_k=config.top_k,
            seed=ctx.seed("samples"),
        )
    observed = Records(ctx.out / "samples.jsonl")  # for the report: the prompts are no part of the key
    for prompt, text in samples:
        observed.append({"prompt": prompt, "text": text})
