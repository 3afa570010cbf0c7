"""mlxchat --help: the verbs, the groups of settings with their options, and what else can be written."""

from __future__ import annotations

from textwrap import fill

from mlxchat import __version__
from mlxchat.composition.compose import describe_options, group_names, group_options
from mlxchat.config.verbs import VERBS
from mlxchat.runner.stage import Stages

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
