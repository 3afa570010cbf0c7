"""The schema of a configuration, with a section for each own stage that has settings; and a step's own settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlxchat.config.parts import import_module
from mlxchat.config.schema import EXECUTORS, Config, ExecutorConfig
from mlxchat.errors import ConfigError, suggest
from mlxchat.runner.stage import Stage, Stages


def schema_of(places: Sequence[str]) -> type[Config]:
    """Return `Config` with the sections of the own stages that these places and installed packages hold.

    Raises:
        ConfigError: a place holds no stage, or the settings of one are no dataclass that YAML can fill.
    """
    return _schema_of(tuple(places), Path.cwd())


@cache
def _schema_of(places: tuple[str, ...], here: Path) -> type[Config]:
    del here  # relative places mean others elsewhere
    stages = [stage for stage in Stages(places).own.values() if stage.settings is not None]
    if not stages:
        return Config
    known = {item.name for item in fields(Config)}
    if taken := [stage for stage in stages if stage.name in known]:
        raise ConfigError(f"{taken[0].path}: {taken[0].name} is a section of mlxchat's own. Rename the file")
    sections = [(stage.name, kind, _section(kind)) for stage in stages for kind in [_settings_class(stage)]]

    def reduce(config: Any) -> tuple[Any, ...]:
        return _restore, (places, {item.name: getattr(config, item.name) for item in fields(config)})

    return make_dataclass(
        "Config", sections, bases=(Config,), kw_only=True, namespace={"__reduce__": reduce, "__doc__": Config.__doc__}
    )


def config_of(config: Config, step: str, stage: Stage) -> Config:
    """Return the configuration as a step sees it: its `with` in place of settings of the stage's own section.

    Args:
        config: of the whole run.
        step: its name.
        stage: the step's.

    Raises:
        ConfigError: a setting is unknown or has another type, or the stage has no section of its own.
    """
    given, where = config.pipeline[step].get("with"), f"pipeline.{step}.with"
    if not given:
        return config
    section = getattr(config, stage.name, None) if stage.name in stage.config else None
    if not is_dataclass(section) or not isinstance(given, Mapping):
        expected = f"a mapping of settings of {stage.name}" if is_dataclass(section) else "nothing"
        raise ConfigError(f"{where} is {given}, expected {expected}: `with` sets what the stage has in its own section")
    return replace(config, **{stage.name: _with(section, given, stage.name, where)})


def executor_of(config: Config, step: str) -> ExecutorConfig:
    """Return where a step runs: its own `executor` over the run's, or over conf/executor if that is of another kind.

    Raises:
        ConfigError: there is no such executor, or a setting is unknown or has another type.
    """
    given, where = config.pipeline[step].get("executor"), f"pipeline.{step}.executor"
    if given is None:
        return config.executor
    own = {"kind": given} if isinstance(given, str) else given
    if not isinstance(own, Mapping):
        raise ConfigError(f"{where} is {given}, expected one of {', '.join(EXECUTORS)}, or {{kind: slurm, …}}")
    kind = own.get("kind", config.executor.kind)
    if kind not in EXECUTORS:
        raise ConfigError(f'{where}: there is no executor "{kind}": {", ".join(EXECUTORS)}.{suggest(kind, EXECUTORS)}')
    base = config.executor if kind == config.executor.kind else ExecutorConfig(**_executor_settings(kind))
    found: ExecutorConfig = _with(base, own, "executor", where)
    return found


def _executor_settings(kind: str) -> dict[str, Any]:
    """Return what conf/executor/<kind>.yaml says, with the file that it is based on."""
    import yaml

    own: dict[str, Any] = yaml.safe_load(files("mlxchat.conf").joinpath("executor", f"{kind}.yaml").read_text("utf-8"))
    based_on = own.pop("defaults", [])
    return {key: value for name in based_on for key, value in _executor_settings(name).items()} | own


def _with(section: Any, given: Mapping[str, Any], name: str, where: str) -> Any:
    """Return a section with other settings.

    Args:
        section: a dataclass.
        given: setting → value.
        name: of the section, for messages.
        where: the key of `given`, for messages.

    Raises:
        ConfigError: a setting is unknown or has another type.
    """
    known = [item.name for item in fields(section)]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError("\n".join(f'there is no "{name}.{key}" for {where}.{suggest(key, known)}' for key in unknown))
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), dict(given)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}") from None


def _restore(places: tuple[str, ...], values: dict[str, Any]) -> Config:
    """Return a configuration in another process."""
    return schema_of(places)(**values)


def _section(kind: type) -> Any:
    # OmegaConf takes the class itself for a section whose values are not known yet.
    return field(default_factory=lambda: kind)


def _settings_class(stage: Stage) -> type:
    """Import the dataclass of a stage's settings.

    Raises:
        ConfigError: it cannot be imported, loads MLX, or has fields of a type that YAML cannot fill.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    assert stage.settings is not None
    module, _, name = stage.settings.partition(":")
    was_there = "mlx" in sys.modules
    try:
        kind = getattr(import_module(module, stage.root), name, None)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{stage.path}: importing {module} for the settings failed ({type(error).__name__}: {error})"
        ) from None
    if "mlx" in sys.modules and not was_there:
        raise ConfigError(
            f"{stage.path}: importing {module} for the settings loads MLX, which each start would wait for. Import it "
            f'inside run, or move the dataclass to a file of its own: SETTINGS = "module:Class"'
        )
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ConfigError(f"{stage.path}: {stage.settings} is no dataclass")
    try:
        OmegaConf.structured(kind)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{stage.path}: {name}: {str(error).splitlines()[0]}") from None
    return kind
