"""mlxchat run: compose, plan, execute, report."""

from __future__ import annotations

from mlxchat.composition.compose import compose_config, split_options
from mlxchat.sweep.job import run_pipeline

_SWEEP_FLAGS = {"-m", "--multirun"}
_HYDRA_FLAGS = {
    "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc",
    "--resolve", "--package", "-p",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the pipeline, or a sweep of it, or what Hydra's own options ask for."""
    arguments = ["fail_fast=true" if argument == "--fail-fast" else argument for argument in arguments]
    names = {argument.partition("=")[0] for argument in arguments}
    if names & _HYDRA_FLAGS:
        from mlxchat.commands.hydra_options import run_with_hydra

        return run_with_hydra(arguments)
    if "--help" in arguments or "-h" in arguments:
        from mlxchat.commands.help import describe_usage

        print(describe_usage())
        return 0
    if "sweep" in {name.lstrip("+") for name in names} and not any(item.endswith("sweep=none") for item in arguments):
        from mlxchat.sweep.search import run_search

        return run_search(arguments)
    if names & _SWEEP_FLAGS:
        from mlxchat.sweep.sweeper import run_sweep

        return run_sweep(arguments)
    composed = compose_config(*split_options([argument for argument in arguments if argument not in ("-r", "--run")]))
    if composed.config.sweep.kind != "none":  # chosen by a file of the user's
        from mlxchat.sweep.search import run_search

        return run_search(arguments)
    if composed.implied:
        print(
            f"recipe: {composed.implied[0]}, implied by model=. The default recipe: experiment=quickstart", flush=True
        )
    run_pipeline(composed)
    return 0
