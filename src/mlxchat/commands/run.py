"""mlxchat run: compose, plan, execute, report; and mlxchat --help."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, Namespace
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from mlxchat import __version__
from mlxchat.commands.arguments import Parser
from mlxchat.config.replaced import find_replacement
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError, suggest

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def run(parser: Parser) -> None:
    """Declare `mlxchat run`, which is also `mlxchat` without a verb."""
    parser.take_names("", least=0, most=None)  # each is refused with a suggestion
    parser.take_settings()
    parser.long_help = describe_usage
    add = parser.add_argument
    add("--multirun", "-m", action="store_true", help="sweep over comma-separated values: one run per value")
    add("--fail-fast", action="store_true", help="a failed step also stops steps that do not need it")
    add("--run", "-r", action="store_true", help=SUPPRESS)  # accepted for Hydra's users; it changes nothing
    add("--cfg", "-c", choices=("job", "hydra", "all"), help="print the composed configuration")
    add("--package", "-p", metavar="SECTION", help="with --cfg: only this section")
    add("--resolve", action="store_true", help="with --cfg: resolve references")
    add("--info", "-i", nargs="?", const="all", metavar="TOPIC", help=f"Hydra's information: {', '.join(_TOPICS)}")
    add("--version", "-V", action="version", version=f"mlxchat {__version__}", help="print the version")


def _run(options: Namespace) -> int:
    """Run the pipeline, a sweep or a search, or print the output of Hydra's own options."""
    if options.info is not None and options.info not in _TOPICS:  # followed by a setting
        options.settings, options.info = [options.info, *options.settings], "all"
    if options.info or options.cfg:
        _run_with_hydra(options)
        return 0
    if options.package or options.resolve:
        raise ConfigError("-p SECTION and --resolve require --cfg job")
    if options.names:
        raise _no_verb(options.names[0], [*options.names[1:], *options.settings])
    settings = [*options.settings, *["fail_fast=true"] * options.fail_fast]
    if any(each.lstrip("+").startswith("sweep=") for each in settings if not each.endswith("sweep=none")):
        from mlxchat.sweep.search import run_search

        return run_search(settings)
    if options.multirun:
        from mlxchat.sweep.sweeper import run_sweep

        return run_sweep(settings)
    from mlxchat.pipeline import compose, run_pipeline

    composed = compose(*settings).composed
    if composed.config.sweep.kind != "none":  # chosen by a user's file
        from mlxchat.sweep.search import run_search

        return run_search(settings)
    if composed.implied:
        recipe = f"recipe: {composed.implied[0]}, implied by model=."
        print(f"{recipe} The default recipe: experiment=quickstart", flush=True)
    run_pipeline(composed)
    return 0


def _no_verb(word: str, others: list[str]) -> ConfigError:
    """Return the error for an unknown verb."""
    from mlxchat.composition.compose import group_options
    from mlxchat.runner.stage import Stages

    for group, known in (("stage", Stages()), ("experiment", group_options("experiment"))):
        if word in known:
            meant = " ".join([f"{group}={word}", *others])
            return ConfigError(f'there is no verb "{word}". For the {group}: mlxchat {meant}')
    if gone := find_replacement(word):
        return ConfigError(f'there is no verb "{word}".{gone}')
    verbs = [verb for verb in VERBS if " " not in verb]
    return ConfigError(f'there is no verb "{word}": {", ".join(verbs)}.{suggest(word, verbs)}')


def _run_with_hydra(options: Namespace) -> None:
    """Let Hydra print the configuration or information about it; mistakes in settings are refused as in a run."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from mlxchat.composition.compose import (
        CONF_MODULE,
        compose_config,
        places_of_stages,
        register_schema,
        search_path,
        split_options,
    )
    from mlxchat.composition.overrides import as_hydra
    from mlxchat.composition.sections import schema_of

    overrides, folders, primary = split_options([*options.names, *options.settings])
    own = [each for each in overrides if not each.lstrip("+~").startswith(("hydra.", "hydra/"))]
    compose_config(own, folders, primary)
    schema = schema_of(places_of_stages(overrides, folders, primary))
    register_schema(schema)
    flags = ["--resolve"] * options.resolve
    for name in ("cfg", "package", "info"):
        if value := getattr(options, name):
            flags += [f"--{name}", value]
    if primary is not None:
        flags += ["--config-path", str(primary.parent), "--config-name", primary.stem]
    # Otherwise Hydra prints its own errors and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=f"pkg://{CONF_MODULE}", config_name="config")
    def nothing(composed: DictConfig) -> None:
        """Do nothing: Hydra has printed its output."""

    settings = [*as_hydra(overrides, schema, imply=primary is None), *search_path(folders, primary)]
    argv, sys.argv = sys.argv, ["mlxchat", *flags, *settings]
    try:
        nothing()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    finally:
        sys.argv = argv


_USAGE = """mlxchat {version}: nanochat's pipeline on Apple MLX, as a cached DAG.

  mlxchat [run] [SETTINGS]           corpus → tokenizer → pretrain → midtrain → sft → rl → eval; results are cached
  mlxchat stage=pretrain             one stage or step, and the steps that it needs
  mlxchat model=d20                  nanochat's recipe at this depth; `mlxchat plan model=d20` shows what it takes
  mlxchat experiment=quickstart model=d6    the default recipe, deeper
  mlxchat -m seed=1,2                a sweep: one run per value, shared steps computed once
  mlxchat sweep=tpe 'KEY=interval(0.1,1)'   a search: earlier results guide each trial
  mlxchat experiment=speedrun_d20    a recipe from conf/experiment
  mlxchat VERB [SETTINGS] [--help]

Verbs
{verbs}

Settings are written group=option or key=value:
{groups}
  any key of the configuration: `mlxchat --cfg job` prints them; +key adds, ~key removes
  outputs=PATH    folder of the artifacts        force=[sft]    run a step again although it is done

{options}
MLXCHAT_DEBUG=1 shows tracebacks; MLXCHAT_BLAS sets the BLAS of MLX on a Linux CPU, or switches it off;
MLXCHAT_CPU=plain uses the code of GPUs there. MLXCHAT_LOCKS: folder of the GPUs' locks (/tmp/mlxchat-UID).
"""


def describe_usage(options: str) -> str:
    """Return the text of `mlxchat --help`; `options` is its section of options, formatted by argparse."""
    from mlxchat.composition.compose import group_names, group_options
    from mlxchat.composition.overrides import describe_options
    from mlxchat.runner.stage import Stages

    verbs = "\n".join(f"  {verb:<11} {purpose}" for verb, (_, purpose) in VERBS.items() if " " not in verb)
    groups = [group for group in group_names() if group not in ("settings", "mixture")]
    choices = {f"{group}=": describe_options(group_options(group)) for group in groups}
    # The only group that is used in several places.
    choices["mixture@sft.mixture= (or @midtrain.mixture=)"] = describe_options(group_options("mixture"))
    choices["stage="] = describe_options(["all", *Stages()])
    wrap = TextWrapper(width=118, initial_indent="  ", subsequent_indent=" " * 17, break_on_hyphens=False)
    lines = [wrap.fill(f"{name:<14} {names.replace(', ', ' ')}") for name, names in choices.items()]
    return _USAGE.format(version=__version__, verbs=verbs, groups="\n".join(lines), options=options)
