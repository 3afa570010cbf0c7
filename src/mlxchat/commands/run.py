"""mlxchat run: compose, plan, execute, report; and mlxchat --help."""

from __future__ import annotations

import os
import sys
from textwrap import fill
from typing import TYPE_CHECKING

from mlxchat import __version__
from mlxchat.composition.compose import (
    CONF_MODULE,
    compose_config,
    describe_options,
    group_names,
    group_options,
    places_of_stages,
    register_schema,
    search_path,
    split_options,
)
from mlxchat.composition.overrides import as_hydra
from mlxchat.composition.sections import schema_of
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError
from mlxchat.runner.stage import Stages
from mlxchat.sweep.job import run_pipeline

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SWEEP_FLAGS = {"-m", "--multirun"}
_HYDRA_FLAGS = {
    "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc",
    "--resolve", "--package", "-p",
}  # fmt: skip


def run(arguments: list[str]) -> int:
    """Run the pipeline, or a sweep of it, or what Hydra's own options ask for."""
    arguments = ["fail_fast=true" if argument == "--fail-fast" else argument for argument in arguments]
    names = {argument.partition("=")[0] for argument in arguments}
    if names & _HYDRA_FLAGS:
        return run_with_hydra(arguments)
    if "--help" in arguments or "-h" in arguments:
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


_HYDRA_WITH_VALUE = ("--cfg", "-c", "--package", "-p")
_INFO = ("--info", "-i")
_COMPLETION = ("--shell-completion", "-sc")
_ALONE = (*_INFO, "--resolve", "--hydra-help", "--run", "-r", "--multirun", "-m")
_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def run_with_hydra(arguments: list[str]) -> int:
    """Hand a command line to Hydra; return 0.

    Raises:
        ConfigError: the composition is wrong, or the options ask for nothing to be shown.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()  # for --shell-completion
    if not {*_COMPLETION} & {*arguments}:  # what follows that is a word, not an override
        arguments = _prepare(arguments)
    # Otherwise Hydra prints its own errors and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=f"pkg://{CONF_MODULE}", config_name="config")
    def refuse(composed: DictConfig) -> None:
        raise ConfigError("-p SECTION and --resolve go with --cfg job")

    argv, sys.argv = sys.argv, ["mlxchat", *arguments]
    try:
        refuse()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    finally:
        sys.argv = argv
    return 0


def _prepare(arguments: list[str]) -> list[str]:
    """Return the arguments for Hydra's parser; mistakes in the settings are refused as a run refuses them."""
    flags, rest = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        option = argument.partition("=")[0]
        if option in (*_HYDRA_WITH_VALUE, *_ALONE):
            flags.append(argument)
            takes = argument in _HYDRA_WITH_VALUE or (argument in _INFO and queue[:1] and queue[0] in _TOPICS)
            flags += [queue.pop(0)] if takes and queue else []
        else:
            rest.append(argument)
    overrides, folders, primary = split_options(rest)
    of_hydra = [each for each in overrides if each.lstrip("+~").startswith(("hydra.", "hydra/"))]
    compose_config([each for each in overrides if each not in of_hydra], folders, primary)
    schema = schema_of(places_of_stages(overrides, folders, primary))
    register_schema(schema)
    if primary is not None:
        flags += ["--config-path", str(primary.parent), "--config-name", primary.stem]
    return [*flags, *as_hydra(overrides, schema, imply=primary is None), *search_path(folders, primary)]


_USAGE = """mlxchat {version}: nanochat's pipeline on Apple MLX, as a cached DAG.

  mlxchat [run] [SETTINGS]           corpus → tokenizer → pretrain → midtrain → sft → rl → eval; what is done is kept
  mlxchat stage=pretrain             one stage, or step, and what it needs
  mlxchat model=d20                  nanochat's recipe at this depth; `mlxchat plan model=d20` says what it takes
  mlxchat experiment=quickstart model=d6    the default recipe, deeper
  mlxchat -m seed=1,2                a sweep: one run per value, shared steps computed once
  mlxchat sweep=tpe 'KEY=interval(0.1,1)'   a search: each trial is chosen by the results so far
  mlxchat experiment=speedrun_d20    a recipe from conf/experiment
  mlxchat VERB [SETTINGS] [--help]

Verbs
{verbs}

Settings are written group=option or key=value:
{groups}
  any key of the configuration: `mlxchat --cfg job` prints it; +key adds, ~key removes
  outputs=PATH    where artifacts are kept        force=[sft]    run a step again although it is done

Further options
  -m, --multirun            sweep over comma-separated values
  --fail-fast               a step that fails stops the others too
  --cfg job [-p SECTION]    print the composed configuration (--resolve: with its references resolved)
  --config-dir DIR          find further YAML files in DIR
  -cn NAME, -cp DIR         compose NAME.yaml of DIR (or of a --config-dir) in place of our config.yaml
  --shell-completion, --hydra-help, --info    Hydra's own
  --version, --help

MLXCHAT_DEBUG=1 shows tracebacks; MLXCHAT_BLAS names or switches off the BLAS that serves MLX on a Linux CPU;
MLXCHAT_CPU=plain uses the code of GPUs there. MLXCHAT_LOCKS is the folder of the GPUs' locks (/tmp/mlxchat-UID).
"""


def describe_usage() -> str:
    """Return what `mlxchat --help` prints."""
    verbs = "\n".join(f"  {verb:<10} {purpose}" for verb, (_, purpose) in VERBS.items())
    options = {
        f"{group}=": describe_options(group_options(group))
        for group in group_names()
        if group not in ("settings", "mixture")
    }
    # The one group that is used at several places.
    options |= {"mixture@sft.mixture= (or @midtrain.mixture=)": describe_options(group_options("mixture"))}
    options |= {"stage=": describe_options(["all", *Stages()])}
    groups = "\n".join(
        fill(
            f"{name:<14} {names.replace(', ', ' ')}", width=118, initial_indent="  ",
            subsequent_indent=" " * 17, break_on_hyphens=False,
        )
        for name, names in options.items()
    )  # fmt: skip
    return _USAGE.format(version=__version__, verbs=verbs, groups=groups)
