"""schedules_*.json: multipliers, momentum, weight decay and the derived hyperparameters of both snapshots."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from comparison import Comparison, Quantity, largest, same
from parity_file import ParityFile

from mlxchat.composition.compose import compose_config
from mlxchat.composition.problems import find_problems
from mlxchat.config.schema import Config, MomentumConfig, ScheduleConfig
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of
from mlxchat.optim.optimizer import Optimizer, lr_multiplier, muon_momentum, rates_at
from mlxchat.planning.horizon import Hyperparameters, derive_hyperparameters

MULTIPLIER = 1e-9
VARIANTS = ("oct2025", "jul2026")
_EXPERIMENTS = {"oct2025": "speedrun_d20", "jul2026": "speedrun_jul2026_d24"}

# Our names of nanochat's settings. Settings of rows and memory are left out: they change none of the numbers.
_SETTINGS = {
    "aspect_ratio": "model.aspect_ratio",
    "head_dim": "model.head_width",
    "max_seq_len": "model.context_tokens",
    "window_pattern": "architecture.window_pattern",
    "vocab_size": "tokenizer.vocab_size",
    "embedding_lr": "optimizer.embedding_lr",
    "unembedding_lr": "optimizer.unembedding_lr",
    "matrix_lr": "optimizer.matrix_lr",
    "scalar_lr": "optimizer.scalar_lr",
    "weight_decay": "optimizer.weight_decay",
    "warmup_steps": "pretrain.schedule.warmup_iterations",
    "warmup_ratio": "pretrain.schedule.warmup_frac",
    "warmdown_ratio": "pretrain.schedule.warmdown_frac",
    "final_lr_frac": "pretrain.schedule.final_lr_frac",
}
_SCHEDULE = ("warmup_steps", "warmup_ratio", "warmdown_ratio", "final_lr_frac")


def schedules(file: ParityFile) -> Iterator[Comparison]:
    """Compare the factors at every update, where nanochat's negative ones count as 0, the least that ours can be."""
    for variant in VARIANTS:
        errors: dict[str, dict[str, float]] = {"lr_multiplier": {}, "muon_momentum": {}, "weight_decay": {}}
        for number, case in enumerate(file.json[variant]["schedules"]):
            # SFT and RL have no such settings: their rates fall from the first update to the last.
            settings = {"warmdown_ratio": 1.0} | case if case["stage"] != "base" else case
            name = f"{case['stage']} {number}"
            for key, values in _rates(variant, settings, range(case["num_iterations"])).items():
                if key in case:
                    errors[key][name] = _clamped_distance(values, case[key])
        yield largest(f"multipliers of the rates, {variant}", errors["lr_multiplier"], MULTIPLIER)
        yield largest(f"Muon's momentum, {variant}", errors["muon_momentum"], MULTIPLIER)
        if errors["weight_decay"]:
            yield largest(f"weight decay, {variant}", errors["weight_decay"], MULTIPLIER)


def progress(file: ParityFile) -> Iterator[Comparison]:
    """Compare schedules over progress with ours over updates, for a training so long that both agree.

    Not compared: the first release's schedule, reversed by mistake, and the rise, which ours counts in updates.
    """
    for variant in VARIANTS:
        multipliers, momenta, length = {}, {}, 200_000
        for number, case in enumerate(file.json[variant]["progress_schedules"]):
            if "commit" in case:
                continue
            warmup, warmdown = case.get("warmup_ratio", 0.0), case.get("warmdown_ratio", 0.2)
            for place, expected in zip(case["progress"], case["lr_multiplier"], strict=True):
                if place < warmup:
                    continue
                final = case.get("final_lr_frac", 0.0)
                schedule = ScheduleConfig(
                    warmup_frac=warmup, warmdown_frac=warmdown, final_lr_frac=final, shape="linear"
                )
                got = lr_multiplier(place * length, length, schedule)
                multipliers[f"{case['stage']} {number} at {place}"] = _clamped_distance([got], [expected])
            for step, expected in zip(case["muon_momentum_steps"], case["muon_momentum"], strict=True):
                momentum = MomentumConfig(start=0.85, end=0.95, warmup_iterations=300, final=None)
                got = muon_momentum(step, length, momentum, warmdown_frac=0.0)
                momenta[f"{case['stage']} {number} at {step}"] = abs(got - expected)
        yield largest(f"multipliers over progress, {variant}", multipliers, MULTIPLIER)
        yield largest(f"momentum of conversations, {variant}", momenta, MULTIPLIER)


def scripts(file: ParityFile) -> Iterator[Comparison]:
    """Compare the rates that whole runs of base_train gave their optimizer at each update.

    Those of mid_train and chat_sft count micro-batches and ours count updates, so they are not compared.
    """
    for variant in VARIANTS:
        found: dict[str, float] = {}
        for number, case in enumerate(file.json[variant]["script_runs"]):
            if not case["script"].endswith("base_train.py"):
                continue
            settings = case["settings"] | {"weight_decay_scaled": case.get("setup_optimizer_weight_decay", 0.0)}
            values = _rates(variant, settings, range(case["num_updates"]))
            name = f"run {number}"
            found[name] = _clamped_distance(values["lr_multiplier"], case["lr_multiplier"])
            found[f"{name}, momentum"] = _clamped_distance(values["muon_momentum"], case["muon_momentum"])
            if "muon_weight_decay" in case:
                found[f"{name}, weight decay"] = _clamped_distance(values["weight_decay"], case["muon_weight_decay"])
            updates = settings["num_iterations"]
            found[f"{name}, updates"] = float(abs(updates - case["num_updates"]))
        yield largest(f"what base_train gave its optimizer, {variant}", found, MULTIPLIER)


def hyperparameters(file: ParityFile) -> Iterator[Comparison]:
    """Compare sizes, counts, horizons, batches and optimizer groups at every depth; FLOPs only of training."""
    for variant in VARIANTS:
        values = file.json[variant]
        default = values["hyperparameters"][0]["settings"]
        cases = [(each["settings"], row) for each in values["hyperparameters"] for row in each["rows"]]
        cases += [(default | each["override"], each) for each in values["horizon_overrides"]]
        integers: list[tuple[str, Any, Any]] = []
        refused: list[tuple[str, Any, Any]] = []
        scales: dict[str, float] = {}
        groups: dict[str, float] = {}
        for number, (settings, row) in enumerate(cases):
            config = _config(variant, tuple(settings.items()), row["depth"])
            if "error" in row:  # nanochat refuses a width that its heads do not divide; ours takes more heads
                made = sizes_of(config.model, config.architecture, settings["vocab_size"])
                refused.append((f"d{row['depth']}", made.width % made.num_heads + len(find_problems(config)), 0))
                continue
            sizes = sizes_of(config.model, config.architecture, settings["vocab_size"])
            derived = derive_hyperparameters(config, sizes)
            got = _integers(sizes, derived, settings)
            name = f"{number}: d{row['depth']}"
            integers += [(f"{name} {key}", got[key], value) for key, value in _flat(row) if key in got]
            for key, number in (
                ("batch_lr_scale", derived.batch_lr_scale),
                ("weight_decay_scaled", derived.weight_decay),
            ):
                if key in row:
                    scales[f"{name} {key}"] = abs(number / row[key] - 1)
            groups |= {f"{name} {key}": error for key, error in _group_errors(sizes, config, derived, row)}
        yield same(f"sizes, counts and horizons, {variant}", integers)
        if refused:
            yield same(f"depths that nanochat refuses have whole heads, {variant}", refused)
        if scales:
            yield largest(f"scale of rates and weight decay, relative, {variant}", scales, MULTIPLIER)
        yield largest(f"rates and numbers of groups, relative, {variant}", groups, MULTIPLIER)


QUANTITIES: tuple[Quantity, ...] = (schedules, progress, scripts, hyperparameters)


@cache
def _config(variant: str, settings: tuple[tuple[str, Any], ...], depth: int) -> Config:
    """Return the configuration of a snapshot's speedrun with nanochat's settings."""
    config, given = _composed(variant, tuple(pair for pair in settings if pair[0] in _SETTINGS)), dict(settings)
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


@cache
def _composed(variant: str, settings: tuple[tuple[str, Any], ...]) -> Config:
    overrides = [f"experiment={_EXPERIMENTS[variant]}", *(f"{_SETTINGS[key]}={value}" for key, value in settings)]
    config = compose_config(overrides).config
    if config.optimizer.scaling is None:
        return config
    # nanochat's rule has no upper bound.
    scaling = replace(config.optimizer.scaling, max_weight_decay=None)
    return replace(config, optimizer=replace(config.optimizer, scaling=scaling))


def _rates(variant: str, settings: dict[str, Any], iterations: Iterable[int]) -> dict[str, list[float]]:
    """Return the factors that our pretraining takes from a schedule."""
    config = _composed(variant, tuple((key, settings[key]) for key in _SCHEDULE if key in settings))
    schedule = config.pretrain.schedule
    if settings.get("stage", "base") != "base":
        schedule = replace(schedule, warmup_iterations=0, warmup_frac=0.0, final_lr_frac=0.0)
    count = settings["num_iterations"]
    rates = [rates_at(iteration, count, schedule, config.optimizer) for iteration in iterations]
    decay = settings.get("weight_decay_scaled", 0.0)
    return {
        "lr_multiplier": [each.lr_factor for each in rates],
        "muon_momentum": [each.momentum for each in rates],
        "weight_decay": [decay * each.weight_decay_factor for each in rates],
    }


def _integers(sizes: GPTSizes, derived: Hyperparameters, settings: dict[str, Any]) -> dict[str, Any]:
    """Return our numbers under nanochat's names, where `params.` marks those inside `params`."""
    counts, context = count_parameters(sizes), sizes.context_tokens
    total = derived.num_iterations * derived.batch_tokens
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
        "total_tokens": total,
        "grad_accum_steps": -(-derived.batch_tokens // (settings["device_batch_size"] * settings["max_seq_len"])),
    }


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", number) for inner, number in value.items())
        else:
            yield key, value


def _group_errors(
    sizes: GPTSizes, config: Config, derived: Hyperparameters, row: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """Yield the largest relative error of each group of nanochat's optimizer; the weights are never evaluated."""
    groups = row.get("optimizer_groups", [*row.get("adamw_groups", []), *row.get("muon_groups", [])])
    if not groups:
        return
    model = GPT(sizes)
    shapes = {name: value.shape for name, value in flatten_parameters(model).items()}
    optimizer = Optimizer(
        model,
        config.optimizer,
        width=sizes.width,
        batch_lr_scale=derived.batch_lr_scale,
        weight_decay=derived.weight_decay,
    )
    seen: set[str] = set()
    for group in groups:
        if "ns_steps" in group:
            per_tensor = group["num_params"] // group["num_tensors"]
            shape = group.get("shape")
            names = [
                name
                for each in optimizer.stacks.values()
                for name in each
                if (list(shapes[name]) == shape if shape else int(np.prod(shapes[name])) == per_tensor)
            ]
            got = [optimizer.muon_lr, config.optimizer.newton_schulz_iterations]
            expected = [group["lr"], group["ns_steps"]]
            if "beta2" in group:
                got += [config.optimizer.muon_beta2, optimizer.weight_decay]
                expected += [group["beta2"], group["weight_decay"]]
        else:
            starts = tuple({"wte": "transformer.wte"}.get(word, word) for word in group["name"].split())
            names = [name for name in optimizer.adamw_rules if name.startswith(starts)]
            rules = {optimizer.adamw_rules[name] for name in names}
            if len(rules) != 1:
                yield f"{group['name']}: rules", float("inf")
                continue
            (rule,) = rules
            got = [rule.lr, *rule.betas, rule.weight_decay, config.optimizer.adam_epsilon]
            expected = [group["lr"], *group["betas"], group["weight_decay"], group["eps"]]
        seen |= set(names)
        got += [len(names), sum(int(np.prod(shapes[name])) for name in names)]
        expected += [group["num_tensors"], group["num_params"]]
        error = max(abs(ours - theirs) / max(abs(theirs), 1e-30) for ours, theirs in zip(got, expected, strict=True))
        yield f"{group.get('name', 'matrices')} {group.get('shape', '')}".strip(), float(error)
    if seen != shapes.keys():
        yield "parameters in no group", float("inf")


def _clamped_distance(got: list[float], expected: list[float]) -> float:
    if len(got) != len(expected):
        return float("inf")
    return float(np.abs(np.array(got) - np.maximum(expected, 0)).max())
