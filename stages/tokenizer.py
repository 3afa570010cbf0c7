"""Tokenizer: train byte-pair encoding on the corpus, or take one over, and measure how well it compresses text.

Counterpart of nanochat's tok_train.py and tok_eval.py. Options: conf/settings/tokenizer.yaml.
"""

import json
from collections.abc import Iterator

from mlxchat.data.compression import compression_rows
from mlxchat.data.shards import iterate_documents
from mlxchat.data.tokenizer import load_vocabulary, train_tokenizer
from mlxchat.errors import DataError
from mlxchat.runner.context import Context

VERSION = 1
CONFIG = ["tokenizer"]
INPUTS = {"corpus": "corpus"}
PRODUCES = "tokenizer"
OUTPUTS = ["ranks.tiktoken", "tokenizer.json", "tokenizer_config.json", "token_bytes.safetensors", "compression.json"]
LABEL = "tokenizer.vocab_size"


def run(ctx: Context) -> None:
    config = ctx.config.tokenizer
    used_chars = 0

    def crop_documents() -> Iterator[str]:
        nonlocal used_chars
        for document in iterate_documents(ctx.inputs["corpus"], "train", ctx.hints.get("train_chars")):
            text = document[: config.document_chars]
            used_chars += len(text)
            yield text
            if used_chars > config.max_chars:
                return

    if config.source == "train":
        tokenizer = train_tokenizer(crop_documents(), config.vocab_size)
    else:
        tokenizer, keeps_ids = load_vocabulary(config.source)
        ctx.derive({"vocab_size": tokenizer.vocab_size})
        if not keeps_ids:
            print("  ids are counted anew: special tokens of the source stood among them", flush=True)
    validation = list(iterate_documents(ctx.inputs["corpus"], "validation"))
    for document in validation:
        if tokenizer.decode(tokenizer.encode(document)) != document:
            raise DataError("the tokenizer does not return what it encoded; this is a bug")
    rows = compression_rows(tokenizer, validation)
    (ctx.out / "compression.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "rows": rows}, indent=1))
    tokenizer.save(ctx.out)
    ctx.metrics["trained_chars"] = used_chars
    ctx.metrics["bytes_per_token"] = rows[0]["bytes"] / rows[0]["ours"]
