"""What is known of a pretraining before it runs: its memory, and why it cannot extend another. Imports no MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxchat.config.schema import Config
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.memory import Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.fingerprint import flatten
from mlxchat.store.manifest import CONTINUATION, Manifest
from mlxchat.store.store import Store

# What shapes or gives meaning to weights and moments, and what a position in the data is counted in.
_SAME = ("model", "architecture", "optimizer.kind", "optimizer.variant", "pretrain.packing")
_MAY_DIFFER = ("architecture.dropout",)


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of a pretraining depends on."""
    section, row_tokens = config.pretrain, config.pretrain.batch.row_tokens
    # A token has at least a byte; one more begins the text.
    prompts = [min(sizes.context_tokens, 1 + len(prompt.encode())) for prompt in section.prompts]
    return Training(
        sizes=sizes, optimizer=config.optimizer, row_tokens=row_tokens,
        rows=max(1, derive_hyperparameters(config, sizes).batch_tokens // row_tokens),
        second_weights=section.keep == "best", sampled_rows=min(len(prompts), DECODED_ROWS),
        sampled_tokens=max(prompts, default=0) + section.sample_tokens,
        remedies=("a smaller model.depth", "a smaller pretrain.batch.row_tokens"),
    )  # fmt: skip


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot extend the finished training that it names."""
    extended = step.artifacts.get("extends")
    if extended is None:
        return
    planned = {step.name: step for step in plan}
    store = Store(Path(config.outputs))
    found = [*_what_lacks(extended), *_what_differs(step, extended, planned, store)] or _what_is_done(config, extended)
    yield from (f"pretrain.extend={config.pretrain.extend}: {line}" for line in found)


def keeps_state(manifest: Manifest) -> bool:
    """Tell whether a finished training has what a further one begins with: moments and position."""
    return {file["path"] for file in manifest["outputs"]}.issuperset(CONTINUATION)


def _what_lacks(extended: Manifest) -> Iterator[str]:
    if extended["stage"] != "pretrain":
        yield f"{extended['name']} is made by stage {extended['stage']}; only a pretraining can be extended"
    elif not keeps_state(extended):
        yield (
            f"{extended['name']} has no training state. Train it again with its settings and "
            f"pretrain.save_training_state=true 'force=[{extended['step']}]'"
        )


def _what_differs(
    step: PlannedStep, extended: Manifest, planned: Mapping[str, PlannedStep], store: Store
) -> Iterator[str]:
    if extended["stage"] != step.stage.name:
        return
    now, before = _comparable(step.identity), _comparable(extended["config"])
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            yield f"{key} is {now.get(key)}, but {extended['name']} was made with {before.get(key)}"
    for role, source in step.inputs.items():
        made, wanted = extended["inputs"].get(role, {}), planned[source]
        manifest = store.made(wanted.key) if wanted.done else None
        if manifest is None or made.get("tree") != manifest["tree"]:
            here = wanted.artifact or wanted.title
            yield f"its {role} is {here}, but {extended['name']} was made with {made.get('artifact')}"


def _comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in flatten(identity).items() if key not in _MAY_DIFFER}
    flat.setdefault("pretrain.packing", "best_fit")  # an identity leaves it out
    return {key: value for key, value in flat.items() if key in _SAME or key.partition(".")[0] in _SAME}


def _what_is_done(config: Config, extended: Manifest) -> list[str]:
    """Return a line if the horizon needs no more iterations than there are."""
    vocab_size, done = extended["derived"]["vocab_size"], extended["derived"]["num_iterations"]
    wanted = derive_hyperparameters(config, sizes_of(config.model, config.architecture, vocab_size)).num_iterations
    if wanted > done:
        return []
    return [
        f"{extended['name']} already has {done} iterations, and the horizon counts {wanted} from the start: give "
        f"pretrain.num_iterations more than {done}"
    ]
