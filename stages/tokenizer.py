"""Tokenizer: train byte-pair encoding on the corpus, or take one over, and measure how well it compresses text.

Counterpart of nanochat's tok_train.py and tok_eval.py. Settings: `TokenizerConfig` of config/schema.py.
"""

import json

from mlxchat.runner.context import Context
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import Metric, Stage


def is_trained(step: PlannedStep) -> bool:
    return bool(step.config.tokenizer.source == "train")


stage = Stage(
    version=2,
    inputs={"corpus": "corpus"},
    produces="tokenizer",
    outputs=[
        "ranks.tiktoken",
        "tokenizer.json",
        "tokenizer_config.json",
        "token_bytes.safetensors",
        "compression.json",
    ],
    reads=["tokenizer"],
    metrics=[
        Metric("bytes_per_token", "maximize"),
        Metric("chars_per_token", "maximize"),
        Metric("trained_chars", when=is_trained, needs="tokenizer.source=train"),
        Metric("chars_per_second", "maximize", when=is_trained, needs="tokenizer.source=train"),
    ],
    seeded="data",
    label=lambda config: config.tokenizer.vocab_size,
)


def run(ctx: Context) -> None:
    from mlxchat.data.bpe import compression_rows, print_compression, train_on_corpus
    from mlxchat.data.sources import Corpus
    from mlxchat.data.tokenizer import load_vocabulary

    config, corpus = ctx.config.tokenizer, ctx.inputs["corpus"]
    if config.source == "train":
        tokenizer = train_on_corpus(ctx, corpus, config)
    else:
        tokenizer, keeps_ids = load_vocabulary(config.source)
        ctx.derive({"vocab_size": tokenizer.vocab_size})
        if not keeps_ids:
            print("  new ids: the source had special tokens among the others", flush=True)
    splits = {split: Corpus.open(corpus).documents(split) for split in ("train", "validation")}
    rows = compression_rows(tokenizer, splits)
    print_compression(rows)
    (ctx.out / "compression.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "rows": rows}, indent=1))
    tokenizer.save(ctx.out)
    validation = rows[-1]
    ctx.metrics["bytes_per_token"] = validation["ratio"]
    ctx.metrics["chars_per_token"] = validation["chars"] / max(1, validation["ours"])
