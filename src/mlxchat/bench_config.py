"""The schema of `mlxchat bench`; `config.py` holds the rest. Values stand in conf/settings/bench.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class BenchConfig:
    """What `mlxchat bench` measures and how often. No stage reads it, so it is no part of any identity."""

    vocab_size: int = MISSING
    """Tokens of the vocabulary: rows of the embedding and of the head, before architecture.vocab_multiple."""
    batch_rows: int = MISSING
    """Rows of a batch; machine.device_batch_tokens cuts it into micro-batches."""
    row_tokens: int = MISSING
    """Tokens per row, and the context that windows and FLOPs are reckoned with instead of model.context_tokens."""
    steps: int = MISSING
    """Timed repetitions, of which the median counts."""
    warmup_steps: int = MISSING
    """Repetitions before them, not counted: the first one also compiles."""
    split: bool = MISSING
    """Whether the parts of a step are measured too, each alone; takes about as long again."""
    bits: int | None = MISSING
    """8 or 4: of the weights that answers are decoded with; null: float32."""
    kv_bits: int | None = MISSING
    """8 or 4: of the keys and values that answers look back on; null: float32."""
    past_tokens: int = MISSING
    """Tokens that each row has when decoding is measured."""
    chars: int = MISSING
    """Characters of text on which a tokenizer is trained; a quarter of them is encoded."""
    core_examples: int = MISSING
    """Examples of each of CORE's tasks; more where the shots need it."""
    core_tasks: list[str] | None = MISSING
    """Tasks of CORE to measure; null: all."""
    bundle: str | None = MISSING
    """nanochat's eval_bundle.zip, whose examples are used; null: made-up ones of the same shapes."""
