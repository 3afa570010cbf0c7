"""Iterations and batch of a training, from FLOPs or tokens per parameter, and nanochat's scaling.

Counterpart of nanochat's base_train. Since 2026 its batch, rates and weight decay follow from the model's size. The
unit is a training of the reference model: with ratio = D / D_ref, tokens of this training over tokens of that one,

    batch B = 2^round(log2(B_ref × ratio^0.383)), rates × sqrt(B / B_ref), weight decay × sqrt(B / B_ref) / ratio.
"""

import math
from dataclasses import dataclass, replace

from mlxchat.config.schema import Config, ConversationConfig, PreferenceConfig, PretrainConfig, RLConfig
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of

# nanochat tuned its rates at d12 with this batch. The exponent is that of Power Lines (arXiv 2505.13738).
_REFERENCE_DEPTH = 12
_REFERENCE_BATCH_TOKENS = 524288
_BATCH_EXPONENT = 0.383


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Hyperparameters that follow from the size of a model."""

    horizon_parameters: int  # parameters counted by tokens per parameter
    batch_tokens: int  # tokens per iteration
    num_iterations: int
    batch_lr_scale: float  # factor of the rates that scale with the batch
    weight_decay: float  # of Muon jul2026, at the start


def derive_hyperparameters(config: Config, sizes: GPTSizes) -> Hyperparameters:
    """Return batch (null: the best by `optimizer.scaling`), iterations, and numbers scaled from nanochat's d12."""
    pretrain, optimizer = config.pretrain, config.optimizer
    parameters = count_horizon_parameters(sizes, pretrain.horizon_parameters)
    batch_tokens, lr_scale, weight_decay = pretrain.batch.tokens, 1.0, optimizer.weight_decay
    if optimizer.scaling:
        reference_model = replace(config.model, depth=_REFERENCE_DEPTH)
        reference = sizes_of(reference_model, config.architecture, sizes.vocab_size)
        per_parameter = pretrain.tokens_per_parameter or 1.0
        tokens = int(per_parameter * parameters) if pretrain.tokens_per_parameter else parameters
        ratio = tokens / (per_parameter * count_horizon_parameters(reference, pretrain.horizon_parameters))
        if batch_tokens is None:
            best = _REFERENCE_BATCH_TOKENS * ratio**_BATCH_EXPONENT
            batch_tokens = whole_rows(int(2 ** round(math.log2(best))), pretrain.batch.row_tokens)
        lr_scale = math.sqrt(batch_tokens / _REFERENCE_BATCH_TOKENS)
        # Keeps B / (rate × decay × D) as it is at the reference (arXiv 2405.13698), bounded; nanochat's is not.
        weight_decay *= lr_scale / ratio
        if optimizer.max_weight_decay is not None:
            weight_decay = min(weight_decay, max(optimizer.weight_decay, optimizer.max_weight_decay))
    assert batch_tokens is not None, "validation has checked that there is a batch or a rule for it"
    return Hyperparameters(
        horizon_parameters=parameters,
        batch_tokens=batch_tokens,
        num_iterations=count_iterations(pretrain, sizes, batch_tokens),
        batch_lr_scale=lr_scale,
        weight_decay=weight_decay,
    )


def count_horizon_parameters(sizes: GPTSizes, which: str) -> int:
    """Return how many parameters the horizon counts: 'all', or 'matrices_and_head' (nanochat since 2026)."""
    counts = count_parameters(sizes)
    return counts["total"] if which == "all" else counts["matrices"] + counts["head"]


def whole_rows(tokens: int, row_tokens: int) -> int:
    """Return the nearest number of tokens, at most `tokens`, that is a positive number of rows."""
    return max(1, tokens // row_tokens) * row_tokens


def count_later_iterations(
    section: ConversationConfig | RLConfig | PreferenceConfig, per_epoch: int, per_iteration: int
) -> int:
    """Return the iterations of a later stage: as given, or those of its epochs; per_… count rows, questions, pairs."""
    return section.num_iterations or max(1, section.num_epochs * per_epoch // per_iteration)


def count_iterations(config: PretrainConfig, sizes: GPTSizes, batch_tokens: int) -> int:
    """Return the iterations of the one horizon that is set, at least 1."""
    if config.num_iterations is not None:
        return config.num_iterations
    if config.target_flops is not None:
        return max(1, round(config.target_flops / (flops_per_token(sizes) * batch_tokens)))
    assert config.tokens_per_parameter is not None, "validation has checked that one horizon is set"
    wanted_tokens = int(config.tokens_per_parameter * count_horizon_parameters(sizes, config.horizon_parameters))
    return max(1, wanted_tokens // batch_tokens)


def derive_numbers(derived: Hyperparameters, sizes: GPTSizes, micro_tokens: int) -> dict[str, float | int]:
    """Return what nanochat prints before it trains: sizes, parameters, FLOPs, iterations, tokens, accumulation."""
    counts = count_parameters(sizes)
    tokens = derived.num_iterations * derived.batch_tokens
    return {
        **{name: getattr(sizes, name) for name in ("num_layers", "width", "num_heads", "num_kv_heads", "vocab_size")},
        "num_parameters": counts["total"], "num_matrix_parameters": counts["matrices"],
        "num_embedding_parameters": counts["embedding"], "num_value_embedding_parameters": counts["value_embeddings"],
        "num_head_parameters": counts["head"], "num_scalar_parameters": counts["scalars"],
        "num_horizon_parameters": derived.horizon_parameters, "flops_per_token": flops_per_token(sizes),
        "tokens_per_iteration": derived.batch_tokens, "micro_batch_tokens": micro_tokens,
        "num_accumulations": -(-derived.batch_tokens // micro_tokens), "num_iterations": derived.num_iterations,
        "total_tokens": tokens, "tokens_per_parameter": tokens / derived.horizon_parameters,
        "total_flops": flops_per_token(sizes) * tokens, "batch_lr_scale": derived.batch_lr_scale,
        "weight_decay": derived.weight_decay,
    }  # fmt: skip
