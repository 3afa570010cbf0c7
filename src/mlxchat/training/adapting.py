"""A training of adapters: what it begins with and what it leaves, for all stages that may have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxchat.adapter_config import AdapterConfig
from mlxchat.adapter_problems import adapter_sizes_of
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.model.checkpoint import save_adapters, save_checkpoint
from mlxchat.model.gpt import GPT, trained_parameters
from mlxchat.model.lora import adapters_of, attach_adapters
from mlxchat.ops.device import select_device
from mlxchat.optim.optimizer import AdamWRule
from mlxchat.optimizer_config import OptimizerConfig
from mlxchat.runner.context import Context


def begin_adapters(ctx: Context, config: AdapterConfig, model: GPT) -> AdamWRule | None:
    """Give a model the adapters that a stage asks for, and return how they move; None: all weights are trained.

    Raises:
        ConfigError: they do not fit the model.
    """
    sizes = adapter_sizes_of(f"{ctx.stage}.adapter", config, model.sizes)
    if sizes is None:
        return None
    machine = ctx.config.machine
    dtype = select_device(machine.device, machine.compute_dtype)
    attach_adapters(model, sizes, seed=ctx.seed("adapters"), dtype=dtype)
    rule = rule_of(config, model.sizes.width, ctx.config.optimizer)
    trained = sum(value.size for value in trained_parameters(model).values())
    ctx.derive({"num_trained_parameters": trained, "adapter_learning_rate": rule.lr})
    return rule


def rule_of(config: AdapterConfig, width: int, optimizer: OptimizerConfig) -> AdamWRule:
    """Return how adapters on a model of this width move."""
    lr = config.learning_rate * (optimizer.reference_width / width) ** config.width_exponent
    return AdamWRule(lr, (config.beta1, config.beta2), config.weight_decay)


def save_trained(
    ctx: Context, config: AdapterConfig, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any], base: Path
) -> None:
    """Write what a stage has trained: the model, or its adapters, which name the base."""
    if (sizes := adapters_of(model)) is None:
        save_checkpoint(ctx.out, model, tokenizer, facts)
        return
    save_adapters(
        ctx.out,
        trained_parameters(model),
        sizes,
        base=base,
        sizes=model.sizes,
        tokenizer=tokenizer,
        facts=facts,
    )
