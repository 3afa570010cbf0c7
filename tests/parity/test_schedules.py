"""Multipliers, momentum, weight decay and derived hyperparameters of both snapshots at every depth."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.composition.problems import find_problems
from mlxchat.config.schema import Config
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of
from mlxchat.optim.optimizer import rates_at
from mlxchat.planning.horizon import Hyperparameters, derive_hyperparameters
from parity.values import VARIANTS, assert_same, assert_within, of_files

TOLERANCE = 1e-9
EXPERIMENTS = {"oct2025": "speedrun_d20", "jul2026": "speedrun_jul2026_d24"}
# Our names of nanochat's settings. Settings of rows and memory are left out: they change none of the numbers.
SCHEDULE = {
    "warmup_steps": "pretrain.schedule.warmup_iterations", "warmup_ratio": "pretrain.schedule.warmup_frac",
    "warmdown_ratio": "pretrain.schedule.warmdown_frac", "final_lr_frac": "pretrain.schedule.final_lr_frac",
}  # fmt: skip
SETTINGS = SCHEDULE | {
    "aspect_ratio": "model.aspect_ratio", "head_dim": "model.head_width", "max_seq_len": "model.context_tokens",
    "window_pattern": "architecture.window_pattern", "vocab_size": "tokenizer.vocab_size",
    "embedding_lr": "optimizer.embedding_lr", "unembedding_lr": "optimizer.unembedding_lr",
    "matrix_lr": "optimizer.matrix_lr", "scalar_lr": "optimizer.scalar_lr", "weight_decay": "optimizer.weight_decay",
}  # fmt: skip

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_file = of_files("schedules_*.json")


@cache
def composed(variant: str, settings: tuple[tuple[str, Any], ...]) -> Config:
    overrides = [f"experiment={EXPERIMENTS[variant]}", *(f"{SETTINGS[key]}={value}" for key, value in settings)]
    config = compose_config(overrides).config
    # nanochat's rule has no upper bound.
    return replace(config, optimizer=replace(config.optimizer, max_weight_decay=None))


def rates_of(variant: str, settings: dict[str, Any], count: int) -> dict[str, list[float]]:
    """Return what our training takes from a schedule at each update."""
    config = composed(variant, tuple((key, settings[key]) for key in SCHEDULE if key in settings))
    schedule = config.pretrain.schedule
    if settings.get("stage", "base") != "base":
        schedule = replace(schedule, warmup_iterations=0, warmup_frac=0.0, final_lr_frac=0.0)
    rates = [rates_at(done, settings["num_iterations"], schedule, config.optimizer) for done in range(count)]
    decay = settings.get("weight_decay_scaled", 0.0)
    return {
        "lr_multiplier": [each.lr_factor for each in rates],
        "muon_momentum": [each.momentum for each in rates],
        "weight_decay": [decay * each.weight_decay_factor for each in rates],
    }


@each_file
@each_variant
def test_factors_at_every_update(values, variant):
    errors = {}
    for number, case in enumerate(values.json[variant]["schedules"]):
        # SFT and RL have no such settings: their rates fall from the first update to the last.
        settings = {"warmdown_ratio": 1.0} | case if case["stage"] != "base" else case
        for key, got in rates_of(variant, settings, case["num_iterations"]).items():
            if key in case:
                expected = np.maximum(case[key], 0)  # nanochat's negative factors count as 0
                assert len(got) == len(expected)
                errors[f"{number} {key}"] = float(np.abs(got - expected).max())
    assert_within(TOLERANCE, errors)


def config_of(variant: str, given: dict[str, Any], depth: int) -> Config:
    """Return the configuration of a snapshot's speedrun with nanochat's settings."""
    config = composed(variant, tuple((key, value) for key, value in given.items() if key in SETTINGS))
    horizons = {
        "num_iterations": given.get("num_iterations", -1),
        "target_flops": given.get("target_flops", -1),
        "tokens_per_parameter": given.get("target_param_data_ratio", -1),
    }
    # In nanochat all three may be set, and the first one that is wins.
    chosen = next((key for key, value in horizons.items() if value > 0), None)
    kept = {key: value if key == chosen else None for key, value in horizons.items()}
    batch = replace(config.pretrain.batch, row_tokens=given.get("max_seq_len", config.pretrain.batch.row_tokens))
    if "total_batch_size" in given:
        batch = replace(batch, tokens=given["total_batch_size"] if given["total_batch_size"] > 0 else None)
    return replace(
        config, model=replace(config.model, depth=depth), pretrain=replace(config.pretrain, batch=batch, **kept)
    )


def integers_of(sizes: GPTSizes, derived: Hyperparameters, settings: dict[str, Any]) -> dict[str, Any]:
    """Return our numbers under nanochat's names, where `params.` marks those inside `params`."""
    counts, context = count_parameters(sizes), sizes.context_tokens
    return {
        "model_dim": sizes.width,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_width,
        "padded_vocab_size": sizes.padded_vocab_size,
        "window_sizes": [context if window is None else window for window in sizes.windows],
        "value_embed_layers": [layer for layer in range(sizes.num_layers) if layer in sizes.value_embedding_layers],
        "num_params": counts["total"],
        "params.wte": counts["embedding"],
        "params.lm_head": counts["head"],
        "params.value_embeds": counts["value_embeddings"],
        "params.transformer_matrices": counts["matrices"],
        "params.scalars": counts["scalars"],
        "params.total": counts["total"],
        "scaling_params": counts["matrices"] + counts["head"],
        "flops_per_token": flops_per_token(sizes),
        "total_batch_size_tokens": derived.batch_tokens,
        "num_iterations": derived.num_iterations,
        "total_tokens": derived.num_iterations * derived.batch_tokens,
        "grad_accum_steps": -(-derived.batch_tokens // (settings["device_batch_size"] * settings["max_seq_len"])),
    }


def flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", number) for inner, number in value.items())
        else:
            yield key, value


@each_file
@each_variant
def test_sizes_counts_and_horizons_at_every_depth(values, variant):
    data = values.json[variant]
    default = data["hyperparameters"][0]["settings"]
    cases = [(each["settings"], row) for each in data["hyperparameters"] for row in each["rows"]]
    cases += [(default | each["override"], each) for each in data["horizon_overrides"]]
    integers, errors = [], {}
    for number, (settings, row) in enumerate(cases):
        config, name = config_of(variant, settings, row["depth"]), f"{number}: d{row['depth']}"
        sizes = sizes_of(config.model, config.architecture, settings["vocab_size"])
        if "error" in row:  # nanochat refuses a width that its heads do not divide; ours takes more heads
            integers.append((name, sizes.width % sizes.num_heads + len(find_problems(config)), 0))
            continue
        derived = derive_hyperparameters(config, sizes)
        got = integers_of(sizes, derived, settings)
        integers += [(f"{name} {key}", got[key], value) for key, value in flat(row) if key in got]
        scales = {"batch_lr_scale": derived.batch_lr_scale, "weight_decay_scaled": derived.weight_decay}
        errors |= {f"{name} {key}": abs(ours / row[key] - 1) for key, ours in scales.items() if key in row}
    assert_same(integers)
    assert bool(errors) == (variant == "jul2026"), "oct2025 derives no scales"
    if errors:
        assert_within(TOLERANCE, errors)
