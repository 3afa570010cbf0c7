"""Corpus: gather text, shuffle it once, write it as parquet shards with a fixed validation shard.

Counterpart of nanochat's dataset.py. Text comes from packages that ship it, from local files, or from a dataset on
the Hugging Face Hub. Options: conf/corpus/.
"""

import json

from mlxchat.data.corpus import gather_documents, link_hub_shards
from mlxchat.data.shards import VALIDATION, iterate_documents, shard_paths, write_shards
from mlxchat.runner.context import Context

VERSION = 1
CONFIG = ["corpus"]
INPUTS: dict[str, str] = {}
PRODUCES = "corpus"
OUTPUTS = ["validation.parquet", "corpus.json"]
LABEL = "corpus.name"


def run(ctx: Context) -> None:
    config = ctx.config.corpus
    if config.hub is not None:
        ctx.externals += link_hub_shards(config.hub, ctx.out)
    else:
        documents, sources = gather_documents(
            config.packages, config.paths, document_chars=config.document_chars, seed=ctx.seed("order")
        )
        ctx.externals += sources
        write_shards(
            ctx.out,
            documents,
            validation_documents=config.validation_documents,
            shard_documents=config.shard_documents,
            row_group_documents=config.row_group_documents,
        )
    for split in ("train", "validation"):
        lengths = [len(document) for document in iterate_documents(ctx.out, split)]
        ctx.metrics[f"{split}_documents"] = len(lengths)
        ctx.metrics[f"{split}_chars"] = sum(lengths)
    facts = {
        "validation": VALIDATION,
        "shards": [path.name for path in shard_paths(ctx.out, "train")],
        "sources": ctx.externals,
        **ctx.metrics,
    }
    (ctx.out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
