"""The schema with a section for each of the user's stages that has settings; settings of single steps."""

from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from mlxchat.config.schema import EXECUTORS, REQUEUES, Config, ExecutorConfig
from mlxchat.errors import ConfigError, suggest
from mlxchat.runner.stage import Stage, Stages


@cache
def schema_of(places: tuple[str, ...], here: Path) -> type[Config]:
    """Return `Config` with the sections of the user's stages in these places, which may be relative to `here`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    taken = {item.name for item in fields(Config)}
    sections: list[tuple[str, type, Any]] = []
    for stage in Stages(places).own.values():
        if (kind := stage.settings) is None:
            continue
        if stage.name in taken:
            raise ConfigError(f'{stage.path}: mlxchat already has a section "{stage.name}". Rename the file')
        try:
            OmegaConf.structured(kind)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{stage.path}: {kind} is no dataclass for YAML: {str(error).splitlines()[0]}") from None
        # OmegaConf takes the class as a section whose values are still missing.
        sections.append((stage.name, kind, field(default_factory=partial(_same, kind))))
    if not sections:
        return Config
    return make_dataclass("Config", sections, bases=(Config,), kw_only=True, namespace={"__doc__": Config.__doc__})


def _same(kind: Any) -> Any:
    return kind


def config_of(config: Config, step: str, stage: Stage) -> Config:
    """Return the configuration of one step: the step's `with` overrides settings of its stage's section."""
    given, where = config.pipeline[step].get("with"), f"pipeline.{step}.with"
    if not given:
        return config
    section = getattr(config, stage.name, None) if stage.name in stage.config else None
    if not is_dataclass(section) or not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given}, expected settings of {stage.name} as a mapping")
    return replace(config, **{stage.name: _with(section, given, where)})


def executor_of(config: Config, step: str) -> ExecutorConfig:
    """Return where a step runs: its `executor` overrides the run's, or is another one with its defaults."""
    given, where = config.pipeline[step].get("executor"), f"pipeline.{step}.executor"
    if given is None:
        return config.executor
    own = given if isinstance(given, Mapping) else {"kind": given}
    kind = own.get("kind", config.executor.kind)
    if kind not in EXECUTORS:
        known = ", ".join(EXECUTORS)
        raise ConfigError(f'{where}: "{kind}" is not an executor, expected one of {known}.{suggest(kind, EXECUTORS)}')
    base = config.executor if kind == config.executor.kind else ExecutorConfig(kind=kind, requeues=REQUEUES[kind])
    found: ExecutorConfig = _with(base, own, where)
    return found


def _with(section: Any, given: Mapping[str, Any], where: str) -> Any:
    """Return a section (a dataclass) with some settings replaced; raises ConfigError at `where`."""
    known = [item.name for item in fields(section)]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError("\n".join(f'there is no "{where}.{key}".{suggest(key, known)}' for key in unknown))
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), dict(given)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}") from None
