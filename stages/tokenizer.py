"""Tokenizer: train byte-pair encoding on the corpus, or take one over, and measure how well it compresses text.

Counterpart of nanochat's tok_train.py and tok_eval.py. Options: conf/settings/tokenizer.yaml.
"""

import json

from mlxchat.data.bpe import train_on_corpus
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.evals.compression import compression_rows, print_compression
from mlxchat.runner.context import Context

VERSION = 2
CONFIG = ["tokenizer"]
INPUTS = {"corpus": "corpus"}
PRODUCES = "tokenizer"
OUTPUTS = ["ranks.tiktoken", "tokenizer.json", "tokenizer_config.json", "token_bytes.safetensors", "compression.json"]
METRICS = {
    "bytes_per_token": "maximize",
    "chars_per_token": "maximize",
    "trained_chars": "neither if tokenizer.source=train",
    "chars_per_second": "maximize if tokenizer.source=train",
}
LABEL = "tokenizer.vocab_size"
SEEDED = "data"


def run(ctx: Context) -> None:
    config, corpus = ctx.config.tokenizer, ctx.inputs["corpus"]
    if config.source == "train":
        tokenizer = train_on_corpus(ctx, corpus, config)
    else:
        tokenizer, keeps_ids = load_vocabulary(config.source)
        ctx.derive({"vocab_size": tokenizer.vocab_size})
        if not keeps_ids:
            print("  new ids: the source had special tokens among the others", flush=True)
    rows = compression_rows(
        tokenizer, {split: Corpus.open(corpus).documents(split) for split in ("train", "validation")}
    )
    print_compression(rows)
    (ctx.out / "compression.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "rows": rows}, indent=1))
    tokenizer.save(ctx.out)
    validation = rows[-1]
    ctx.metrics["bytes_per_token"] = validation["ratio"]
    ctx.metrics["chars_per_token"] = validation["chars"] / max(1, validation["ours"])
