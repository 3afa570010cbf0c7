"""How long to train: iterations from FLOPs or from tokens per parameter. Counterpart of nanochat's base_train."""

from __future__ import annotations

from mlxchat.config import PretrainConfig
from mlxchat.model.sizing import GPTSizes, count_parameters, flops_per_token


def count_iterations(config: PretrainConfig, sizes: GPTSizes) -> int:
    """Return the number of iterations that the one horizon which is set asks for, at least 1."""
    if config.num_iterations is not None:
        return config.num_iterations
    if config.target_flops is not None:
        return max(1, round(config.target_flops / (flops_per_token(sizes) * config.batch.tokens)))
    assert config.tokens_per_parameter is not None, "config.validate has checked that one horizon is set"
    wanted_tokens = int(config.tokens_per_parameter * count_parameters(sizes)["total"])
    return max(1, wanted_tokens // config.batch.tokens)


def derive_numbers(config: PretrainConfig, sizes: GPTSizes, micro_tokens: int) -> dict[str, float | int]:
    """Return what nanochat prints before it trains: sizes, parameters, FLOPs, iterations, tokens, accumulation."""
    counts = count_parameters(sizes)
    iterations = count_iterations(config, sizes)
    tokens = iterations * config.batch.tokens
    return {
        "num_layers": sizes.num_layers,
        "width": sizes.width,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "vocab_size": sizes.vocab_size,
        "num_parameters": counts["total"],
        "num_matrix_parameters": counts["matrices"],
        "flops_per_token": flops_per_token(sizes),
        "tokens_per_iteration": config.batch.tokens,
        "micro_batch_tokens": micro_tokens,
        "num_accumulations": -(-config.batch.tokens // micro_tokens),
        "num_iterations": iterations,
        "total_tokens": tokens,
        "tokens_per_parameter": tokens / counts["total"],
        "total_flops": flops_per_token(sizes) * tokens,
    }
