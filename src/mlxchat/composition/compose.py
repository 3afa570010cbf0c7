"""Composes conf/ and overrides to a typed, checked Config; translates Hydra's errors."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlxchat.composition.overrides import as_hydra, implied_experiment
from mlxchat.composition.problems import find_problems
from mlxchat.composition.sections import schema_of
from mlxchat.config.schema import MODELS, Config
from mlxchat.data.vocabulary import vocab_size_of
from mlxchat.errors import ConfigError
from mlxchat.store.fingerprint import flatten

if TYPE_CHECKING:  # Hydra takes longer to import than everything else together, and is often not needed
    from omegaconf import DictConfig

CONF_MODULE = "mlxchat.conf"
_CONFIG_OPTIONS = {
    "--config-dir": "--config-dir", "-cd": "--config-dir",
    "--config-path": "--config-path", "-cp": "--config-path",
    "--config-name": "--config-name", "-cn": "--config-name",
}  # fmt: skip
# What to give instead of these settings, most of them Hydra's.
_REFUSED = {
    "machine.num_processes": "ranks are started by mlx.launch -n N mlxchat …",
    "hydra.run.": "a run's folder is OUTPUTS/runs/<time>-<name>: set outputs=PATH and name=NAME",
    "hydra.output_subdir": "a run writes its config.yaml to OUTPUTS/runs/<time>-<name>",
    "hydra.job.chdir": "a run stays in its working directory; outputs=PATH sets where artifacts go",
    "hydra/launcher": "executor=slurm, ray or submitit_local runs jobs elsewhere",
    "hydra.launcher": "executor=slurm, ray or submitit_local runs jobs elsewhere",
    "hydra/sweeper": "sweep=tpe and sweep=halving search",
    "hydra.sweeper": "a sweep's values are given as KEY=A,B",
    "hydra.sweep.": "a sweep's folder is OUTPUTS/multirun/<time>-<name>-sweep: set outputs=PATH and name=NAME",
}


@dataclass(frozen=True)
class Composed:
    """A configuration and the command line that it comes from."""

    config: Config
    overrides: list[str]
    """Overrides of the command line."""
    choices: dict[str, str]
    """Group → chosen option."""
    implied: list[str] = field(default_factory=list)
    """The experiment that the overrides imply, as an override."""
    options: list[str] = field(default_factory=list)
    """`--config-dir`, `--config-path` and `--config-name`, with their values."""
    params: dict[str, str] = field(default_factory=dict)
    """hydra.sweeper.params: key → values of the sweep that an experiment describes."""

    @property
    def command(self) -> str:
        """The command line that composes this, for a shell."""
        return shlex.join(["mlxchat", *self.options, *self.overrides])


def split_options(arguments: list[str]) -> tuple[list[str], list[str], Path | None]:
    """Return the overrides among arguments, the folders of `--config-dir`, and the file to compose.

    `--config-name NAME` is NAME.yaml in the folder of `--config-path`, in a `--config-dir` or in ours. The file is None
    for our config.yaml.

    Raises:
        ConfigError: another option is left, or a folder or file is missing.
    """
    rest, folders, name, place = [], [], "config", None
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        option, _, value = argument.partition("=")
        if option in _CONFIG_OPTIONS:
            value = value or (queue.pop(0) if queue else "")
            kind = _CONFIG_OPTIONS[option]
            if kind == "--config-name":
                name = value.removesuffix(".yaml")
                continue
            if not Path(value).is_dir():
                raise ConfigError(f'{kind}: there is no folder "{value}"')
            if kind == "--config-dir":
                folders.append(str(Path(value).resolve()))
            else:
                place = Path(value).resolve()
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument}. See: mlxchat --help")
        else:
            rest.append(argument)
    if name == "config" and place is None:
        return rest, folders, None
    places = [place] if place is not None else [*map(Path, folders), conf_folder()]
    primary = next((folder / f"{name}.yaml" for folder in places if (folder / f"{name}.yaml").is_file()), None)
    if primary is None:
        searched = ", ".join(map(str, places))
        hint = "" if name != "config" else ". --config-name NAME reads NAME.yaml; --config-dir DIR only adds options"
        raise ConfigError(f"there is no {name}.yaml in {searched}{hint}")
    return rest, folders, None if primary == conf_folder() / "config.yaml" else primary


def split_config_dirs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--config-dir DIR`, and the folders it named.

    Raises:
        ConfigError: another option is left, or a folder is missing.
    """
    overrides, folders, primary = split_options(arguments)
    if primary is not None:
        raise ConfigError(
            f"{primary}: sweeps and `data show` support only config.yaml. Save the file as DIR/experiment/NAME.yaml "
            "and give --config-dir DIR experiment=NAME"
        )
    return overrides, folders


def register_schema(schema: type[Config] = Config) -> None:
    """Register with Hydra the schema, which config.yaml's defaults list names `schema`, and a model of each depth."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    for name in MODELS if "model" not in store.repo else ():
        store.store(group="model", name=name, node={"depth": int(name[1:])})


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
    schema = schema_of(places_of_stages(overrides, folders, primary))
    composed = _compose_or_explain(overrides, folders, primary, schema)
    choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    choices = {group: option for group, option in choices.items() if "hydra" not in group}
    params = {str(key): str(value) for key, value in (composed.hydra.sweeper.get("params") or {}).items()}
    return Composed(to_typed(composed), overrides, choices, implied, options, params)


def _compose_or_explain(
    overrides: list[str], folders: list[str], primary: Path | None, schema: type[Config]
) -> DictConfig:
    """Return the configuration that Hydra composes.

    Raises:
        ConfigError: names every unknown key and option, or Hydra's first mistake.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from mlxchat.composition.mistakes import explain, find_mistakes

    groups, search = _groups(folders), search_path(folders, primary)
    added = [override for override in overrides if override.startswith("+")]
    if mistakes := list(find_mistakes(added, groups, schema)):
        raise ConfigError("\n".join(mistakes))

    def present() -> dict[str, Any]:
        chosen = [each for each in overrides if each.lstrip("+").partition("=")[0] in groups]
        keys = flatten(cast("dict[str, Any]", OmegaConf.to_container(_compose([*chosen, *search], primary, schema))))
        return {**keys, **{key.rpartition(".")[0]: None for key in keys}}

    try:
        composed = _compose([*overrides, *search], primary, schema)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        places = [*([primary.parent] if primary is not None else []), conf_folder(), *map(Path, folders)]
        lines = list(find_mistakes(overrides, groups, schema, str(error)))
        raise ConfigError("\n".join(lines or [explain(error, places, groups, schema, present)])) from error
    except AssertionError as error:  # OmegaConf's, for a key below null
        keys = [key for each in overrides if (key := each.lstrip("+").partition("=")[0]).startswith("eval.core.")]
        raise ConfigError(f"{' and '.join(keys)}: eval.core is null; core=nanochat sets it") from error
    if OmegaConf.get_type(composed) is not schema:
        raise ConfigError(
            f"{composed.hydra.job.config_name}.yaml does not have mlxchat's schema: its defaults list must start with "
            "`- config` and end with `- _self_`"
        )
    return composed


def search_path(config_dirs: list[str], primary: Path | None = None) -> list[str]:
    """Return the override that makes Hydra search further folders; nothing if there are none."""
    places = [*([f"pkg://{CONF_MODULE}"] if primary else []), *(f"file://{folder}" for folder in config_dirs)]
    return [f"hydra.searchpath=[{','.join(places)}]"] if places else []


def refuse_hydras(overrides: list[str]) -> None:
    """Refuse settings of Hydra that have no effect here.

    Raises:
        ConfigError: names each, with the reason.
    """
    problems = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        reason = next((text for prefix, text in _REFUSED.items() if key.startswith(prefix)), None)
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
            reason = reason or "has no effect on a run"
        if reason is not None:
            problems.append(f"{override}: {reason}")
    if problems:
        raise ConfigError("\n".join(problems))


def places_of_stages(overrides: list[str], config_dirs: list[str], primary: Path | None = None) -> list[str]:
    """Return the possible values of `stages` before composing, since the schema depends on it.

    That is its value on the command line, or the values in all of the user's YAML files; unused sections do no harm.
    """
    given = [each.partition("=")[2] for each in overrides if each.lstrip("+").startswith("stages=")]
    if given:
        return [place for part in given[-1].strip("[]").split(",") if (place := part.strip(" '\""))]
    folders = [Path(folder) for folder in config_dirs] + ([primary.parent] if primary is not None else [])
    texts = (
        path.read_text(encoding="utf-8", errors="replace") for folder in folders for path in folder.rglob("*.yaml")
    )
    found = [place for text in texts if "stages:" in text for place in _stages_in(text)]
    return list(dict.fromkeys(found))


def _stages_in(text: str) -> list[str]:
    import yaml

    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError:
        return []  # Hydra reports it later
    places = record.get("stages") if isinstance(record, dict) else None
    return [each for each in places if isinstance(each, str)] if isinstance(places, list) else []


def to_typed(composed: DictConfig) -> Config:
    """Return a composed configuration as checked dataclasses; removes Hydra's section from it.

    Raises:
        ConfigError: names every missing or impossible value.
    """
    from omegaconf import MISSING, OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from mlxchat.composition.mistakes import first_line

    with open_dict(composed):
        composed.pop("hydra", None)
    plain = cast("dict[str, Any]", OmegaConf.to_container(composed))
    removed = [each.name for each in fields(Config) if each.name not in plain]
    if removed:  # by ~KEY; to_object would fill in "???"
        hints = {key: f"; '~pipeline.{key}' leaves the step out" for key in composed.get("pipeline") or ()}
        raise ConfigError("\n".join(f"{key} cannot be removed, only changed{hints.get(key, '')}" for key in removed))
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        missing = sorted(key for key, value in flatten(plain).items() if value == MISSING)
        lines = [f"{key} has no value: give {key}=…" for key in missing] or [first_line(error)]
        raise ConfigError("\n".join(lines)) from None
    except (ValueError, TypeError) as error:  # raised by a user's __post_init__
        raise ConfigError(str(error)) from None
    assert isinstance(config, Config)
    _check(config)
    return config


def _check(config: Config) -> None:
    problems = find_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    if config.tokenizer.source != "train":  # not cached: the file may have changed since
        config.tokenizer.vocab_size = vocab_size_of(config.tokenizer.source)


@cache
def conf_folder() -> Path:
    """Return the folder of the YAML files that ship with mlxchat."""
    spec = find_spec(CONF_MODULE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def group_options(group: str) -> list[str]:
    """Return the options of a config group that ships with mlxchat."""
    if group == "model":
        return list(MODELS)
    names = [entry.stem for entry in conf_folder().joinpath(group).glob("[!_]*.yaml")]
    return sorted(names)


def describe_options(options: list[str]) -> str:
    """Return the options of a group for a message; abbreviated for `model`."""
    return f"{options[0]} … {options[-1]}" if options == MODELS else ", ".join(options)


def group_names() -> list[str]:
    """Return the config groups that ship with mlxchat."""
    folders = {entry.name for entry in conf_folder().iterdir() if entry.is_dir() and entry.name[0] not in "._"}
    return sorted({*folders, "model"})


def _compose(overrides: list[str], primary: Path | None, schema: type[Config]) -> DictConfig:
    """Return the configuration that Hydra composes from overrides in our syntax."""
    from hydra import compose, initialize_config_dir, initialize_config_module

    words = as_hydra(overrides, schema, imply=primary is None)
    register_schema(schema)
    if primary is not None:
        with initialize_config_dir(str(primary.parent), version_base="1.3"):
            return compose(primary.stem, words, return_hydra_config=True)
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        return compose("config", words, return_hydra_config=True)


def _groups(config_dirs: list[str]) -> dict[str, list[str]]:
    """Return config group → options, those in the user's folders included."""
    groups = {group: group_options(group) for group in group_names()}
    for folder in config_dirs:
        for file in sorted(Path(folder).glob("*/**/*.yaml")):
            group, _, option = file.relative_to(folder).with_suffix("").as_posix().partition("/")
            groups.setdefault(group, []).append(option)
    return groups
