"""Composes conf/ and overrides to a typed, checked Config; translates Hydra's errors."""

from __future__ import annotations

import argparse
import shlex
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlxchat.conf
from mlxchat.composition.overrides import as_hydra, find_mistakes, implied_experiment, refuse_hydras
from mlxchat.composition.problems import find_problems
from mlxchat.composition.sections import schema_of
from mlxchat.config.schema import MODELS, Config
from mlxchat.data.vocabulary import vocab_size_of
from mlxchat.errors import ConfigError, suggest
from mlxchat.store.fingerprint import flatten

if TYPE_CHECKING:  # Hydra takes longer to import than everything else together, and is often not needed
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Composed:
    """A configuration and the command line that it comes from."""

    config: Config
    overrides: list[str]  # of the command line
    choices: dict[str, str]  # group → chosen option
    implied: list[str] = field(default_factory=list)  # the experiment that the overrides imply, as an override
    options: list[str] = field(default_factory=list)  # --config-dir, --config-path, --config-name, with their values
    params: dict[str, str] = field(default_factory=dict)  # hydra.sweeper.params of an experiment that is a sweep
    tree: Any = None  # the settings before references are resolved: a DictConfig

    @property
    def command(self) -> str:
        """The command line that composes this, for a shell."""
        return shlex.join(["mlxchat", *self.options, *self.overrides])


def split_options(arguments: list[str]) -> tuple[list[str], list[str], Path | None]:
    """Return the overrides among arguments, the folders of `--config-dir`, and the file to compose.

    `--config-name NAME` is NAME.yaml in the folder of `--config-path` or in a `--config-dir`; None: our config.yaml.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default="config")
    given, overrides = parser.parse_known_args(arguments)
    own = [given.config_path] if given.config_path is not None else given.config_dir
    if missing := [folder for folder in (*given.config_dir, *own) if not Path(folder).is_dir()]:
        raise ConfigError(f'--config-dir, --config-path: there is no folder "{missing[0]}"')
    folders = [str(Path(folder).resolve()) for folder in given.config_dir]
    name = given.config_name.removesuffix(".yaml")
    if name == "config" and given.config_path is None:
        return overrides, folders, None
    files = [Path(folder).resolve() / f"{name}.yaml" for folder in own]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        read = "--config-path DIR --config-name NAME reads DIR/NAME.yaml; --config-dir DIR only adds options"
        raise ConfigError(f"there is no {name}.yaml in {', '.join(own) or 'a folder'}: {read}")
    return overrides, folders, found


def split_config_dirs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return `split_options` of a verb that composes our config.yaml only."""
    overrides, folders, primary = split_options(arguments)
    if primary is not None:
        instead = "Save the file as DIR/experiment/NAME.yaml and give --config-dir DIR experiment=NAME"
        raise ConfigError(f"{primary}: sweeps and `data show` support only config.yaml. {instead}")
    return overrides, folders


def compose_config(overrides: list[str], config_dirs: list[str] | None = None, primary: Path | None = None) -> Composed:
    """Return the typed configuration for overrides in Hydra's syntax.

    Args:
        overrides: `group=option`, `key=value`, `+key=value`, `~key`.
        config_dirs: folders with further YAML files, searched after the built-in ones.
        primary: the file to compose in place of our config.yaml, which it may include; its folder is searched before
            the built-in files, and no experiment is implied.

    Raises:
        ConfigError: names every unknown name with the nearest valid one, or every impossible value.
    """
    folders = config_dirs or []
    refuse_hydras(overrides)
    options = [word for folder in folders for word in ("--config-dir", folder)]
    if primary is not None:
        options += ["--config-path", str(primary.parent), "--config-name", primary.stem]
    implied = implied_experiment(overrides) if primary is None else []
    schema = schema_of(tuple(_places_of_stages(overrides, folders, primary)), Path.cwd())
    tree = _compose(overrides, folders, primary, schema)
    choices = {str(group): str(option) for group, option in tree.hydra.runtime.choices.items() if "hydra" not in group}
    params = {str(key): str(value) for key, value in (tree.hydra.sweeper.get("params") or {}).items()}
    return Composed(_to_typed(tree), overrides, choices, implied, options, params, tree)


def _compose(overrides: list[str], folders: list[str], primary: Path | None, schema: type[Config]) -> DictConfig:
    """Return the configuration that Hydra composes; ConfigError names every unknown key, or Hydra's first mistake."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from mlxchat.composition.overrides import explain

    groups = _groups(folders)
    if mistakes := list(find_mistakes(overrides, groups, schema)):
        raise ConfigError("\n".join(mistakes))
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)  # config.yaml's defaults list names it
    for name in MODELS if "model" not in store.repo else ():
        store.store(group="model", name=name, node={"depth": int(name[1:])})
    file = primary or conf_folder() / "config.yaml"
    places = [*(["pkg://mlxchat.conf"] if primary else []), *(f"file://{folder}" for folder in folders)]
    searched = [f"hydra.searchpath=[{','.join(places)}]"] if places else []
    words = [*as_hydra(overrides, schema, imply=primary is None), *searched]
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            composed = compose(file.stem, words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(explain(error, [file.parent, *map(Path, folders)], groups, schema)) from error
    except AssertionError as error:  # OmegaConf's, for a key below null
        raise ConfigError("eval.core is null, so it has no settings: core=nanochat sets it") from error
    if OmegaConf.get_type(composed) is not schema:
        expected = "its defaults list must start with `- config` and end with `- _self_`"
        raise ConfigError(f"{file.name} does not have mlxchat's schema: {expected}")
    return composed


def _places_of_stages(overrides: list[str], config_dirs: list[str], primary: Path | None) -> list[str]:
    """Return the possible values of `stages` before composing, since the schema depends on it.

    That is its value on the command line, or the values in all of the user's YAML files; unused sections do no harm.
    """
    import yaml

    given = [each.partition("=")[2] for each in overrides if each.lstrip("+").startswith("stages=")]
    if given:
        return [place for part in given[-1].strip("[]").split(",") if (place := part.strip(" '\""))]
    found: list[str] = []
    for folder in [*map(Path, config_dirs), *([primary.parent] if primary is not None else [])]:
        for path in folder.rglob("*.yaml"):
            text = path.read_text(encoding="utf-8", errors="replace")
            with suppress(yaml.YAMLError):  # Hydra reports it later
                record = yaml.safe_load(text) if "stages:" in text else None
                places = (record.get("stages") if isinstance(record, dict) else None) or []
                found += [places] if isinstance(places, str) else places
    return list(dict.fromkeys(found))


def _to_typed(composed: DictConfig) -> Config:
    """Return a composed configuration as dataclasses; ConfigError names every missing or impossible value."""
    from omegaconf import MISSING, OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from mlxchat.composition.overrides import first_line

    with open_dict(composed):
        composed.pop("hydra", None)
    plain = cast("dict[str, Any]", OmegaConf.to_container(composed))
    schema: Any = OmegaConf.get_type(composed)
    known = [each.name for each in fields(schema)]
    if added := [key for key in plain if key not in known]:  # by +KEY, which Hydra accepts
        raise ConfigError("\n".join(f'there is no "{key}" to set.{suggest(key, known)}' for key in added))
    if removed := [key for key in known if key not in plain]:  # by ~KEY
        raise ConfigError(f"{', '.join(removed)} cannot be removed, only changed; '~pipeline.STEP' leaves a step out")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        missing = sorted(key for key, value in flatten(plain).items() if value == MISSING)
        lines = [f"{key} has no value: give {key}=…" for key in missing] or [first_line(error)]
        raise ConfigError("\n".join(lines)) from None
    except (ValueError, TypeError) as error:  # raised by a user's __post_init__
        raise ConfigError(str(error)) from None
    assert isinstance(config, Config)
    if problems := find_problems(config):
        raise ConfigError("\n".join(problems))
    if config.tokenizer.source != "train":
        config.tokenizer.vocab_size = vocab_size_of(config.tokenizer.source)
    return config


def conf_folder() -> Path:
    """Return the folder of the YAML files that ship with mlxchat."""
    return Path(mlxchat.conf.__path__[0])


def group_options(group: str) -> list[str]:
    """Return the options of a config group that ships with mlxchat."""
    if group == "model":
        return list(MODELS)
    return sorted(entry.stem for entry in conf_folder().joinpath(group).glob("[!_]*.yaml"))


def group_names() -> list[str]:
    """Return the config groups that ship with mlxchat."""
    folders = {entry.name for entry in conf_folder().iterdir() if entry.is_dir() and entry.name[0] not in "._"}
    return sorted({*folders, "model"})


def _groups(config_dirs: list[str]) -> dict[str, list[str]]:
    """Return config group → options, those in the user's folders included."""
    groups = {group: group_options(group) for group in group_names()}
    for folder in config_dirs:
        for file in sorted(Path(folder).glob("*/**/*.yaml")):
            group, _, option = file.relative_to(folder).with_suffix("").as_posix().partition("/")
            groups.setdefault(group, []).append(option)
    return groups
