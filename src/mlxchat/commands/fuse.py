"""mlxchat fuse REF: adapters and the weights below them become one checkpoint, which needs neither of them any more."""

from __future__ import annotations

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, quoted, take_names
from mlxchat.config.wording import format_bytes
from mlxchat.errors import ConfigError
from mlxchat.store.bases import is_adapter
from mlxchat.store.naming import find_model
from mlxchat.store.store import Store, read_manifest


def main(arguments: list[str]) -> int:
    """Fuse a checkpoint that holds adapters, unless that was done before, and say what it is called."""
    parser = make_naming_parser(
        "fuse", "Put a model's adapters into the weights below them: a checkpoint with all of its weights.", "ID"
    )
    options = parser.parse_intermixed_args(arguments)
    (name,), settings = take_names(options.settings, "fuse", 1, 1, "ID")
    store = Store(outputs_folder(settings))
    place = find_model(store, name).place
    if not is_adapter(place):
        raise ConfigError(f"{place.name} has all of its weights already: there are no adapters to fuse")
    return _fuse(store, place.name)


def _fuse(store: Store, name: str) -> int:
    from mlxchat.composition.compose import compose_config
    from mlxchat.sweep.job import plan_of, run_pipeline

    composed = compose_config([
        f"outputs={quoted(str(store.outputs))}", "targets=[fused]", "name=fuse",
        f"+pipeline.fused={{stage: fused, checkpoint: {quoted(f'artifact:{name}')}}}",
    ])  # fmt: skip
    (step,) = plan_of(composed.config, store)
    if not step.done:
        run_pipeline(composed, is_verb=True)
        store.forget()
    made = store.find_made(step.key)
    assert made is not None, "a run that ends has made it"
    size = format_bytes(sum(file["bytes"] for file in read_manifest(made)["outputs"]))
    print(f"{name} with all of its weights is {made.name} ({size}). In a pipeline: artifact:{made.name}")
    return 0
