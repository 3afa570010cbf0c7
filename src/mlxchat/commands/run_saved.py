"""mlxchat run --plan FILE: run what `mlxchat plan --save FILE` showed, and nothing else."""

from __future__ import annotations

from pathlib import Path

from mlxchat.commands.arguments import Parser
from mlxchat.compose import Composed
from mlxchat.composed_cache import restore
from mlxchat.config import Config
from mlxchat.errors import ConfigError
from mlxchat.pipeline_run import run_pipeline
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.saved_plan import check_saved, load_plan
from mlxchat.validation import find_problems


def run_saved(arguments: list[str]) -> Path | None:
    """Run a saved plan; return the run's folder, or None if everything in it is done.

    Raises:
        ConfigError: the file is damaged, settings are given besides it, or it would run something else by now.
    """
    parser = Parser(prog="mlxchat run", allow_abbrev=False)
    parser.add_argument("--plan", metavar="FILE")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        raise ConfigError(f"--plan runs what was saved and takes no further settings, got {' '.join(rest)}")
    path = Path(options.plan)
    record = load_plan(path)
    try:
        config = restore(Config, record["config"])
    except (TypeError, KeyError, AttributeError):
        message = f"--plan: {path} is from another version of mlxchat. Save it anew: mlxchat plan --save FILE"
        raise ConfigError(message) from None
    problems = find_problems(config)
    if problems:
        raise ConfigError("\n".join([f"--plan: {path} cannot be run any more:", *problems]))

    def check(plan: list[PlannedStep]) -> None:
        try:
            remarks = check_saved(record, plan, strict=config.code == "strict")
        except ConfigError as error:
            raise ConfigError(f"--plan: {path}: {error}") from None
        for remark in remarks if config.code != "ignore" else ():
            print(remark)

    return run_pipeline(Composed(config, record["overrides"], record["choices"]), check)
