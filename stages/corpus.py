"""Corpus: gather text, shuffle it once, write it as parquet shards with a fixed validation shard.

Counterpart of nanochat's dataset.py. Text comes from mlxchat itself, from local files, or from a data set on
the Hugging Face Hub, which is pinned and listed, not copied. Options: conf/corpus/.
"""

import json

from mlxchat.runner.context import Context
from mlxchat.runner.stage import Metric, Stage

stage = Stage(
    version=4,
    produces="corpus",
    outputs=["corpus.json"],
    reads=["corpus"],
    metrics=[
        Metric("train_documents", when=lambda step: not step.config.corpus.hub, needs="a corpus in files"),
        Metric("train_chars", when=lambda step: not step.config.corpus.hub, needs="a corpus in files"),
        Metric("validation_documents"),
        Metric("validation_chars"),
        Metric("train_files", when=lambda step: bool(step.config.corpus.hub), needs="corpus.hub"),
        Metric("train_bytes", when=lambda step: bool(step.config.corpus.hub), needs="corpus.hub"),
    ],
    seeded="data",
    label=lambda config: config.corpus.name,
)


def run(ctx: Context) -> None:
    from mlxchat.data.sources import LISTING, VALIDATION, Corpus, gather_documents, pin_corpus, write_shards

    config = ctx.config.corpus

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop("the download of its first files, which are kept as far as they arrived")

    if config.hub is not None:
        held_out, chars = config.validation_documents, ctx.hints.get("train_chars")
        numbers, sources = pin_corpus(config.hub, ctx.out, held_out, chars, check)
        ctx.metrics |= numbers
        ctx.externals += sources
        return
    documents, sources = gather_documents(
        config.packages, config.paths, document_chars=config.document_chars, seed=ctx.data_seed("order")
    )
    ctx.externals += sources
    sizes = {"validation_documents": config.validation_documents, "shard_documents": config.shard_documents}
    write_shards(ctx.out, documents, **sizes)
    corpus = Corpus.open(ctx.out)
    for split in ("train", "validation"):
        lengths = list(map(len, corpus.documents(split)))
        ctx.metrics[f"{split}_documents"] = len(lengths)
        ctx.metrics[f"{split}_chars"] = sum(lengths)
    facts = {"validation": VALIDATION, "shards": [shard.name for shard in corpus.train], **ctx.metrics}
    (ctx.out / LISTING).write_text(json.dumps(facts, indent=1) + "\n")
