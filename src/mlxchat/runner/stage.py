"""Stages: Python files that declare a `Stage` and define its `run`.

Ours are in stages/, users' in the folders and modules of the configuration's `stages`. Planning imports the files, so
they import what only `run` needs inside `run`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mlxchat.config.pins import import_module, module_files
from mlxchat.errors import ConfigError, suggest

_PACKAGE = "mlxchat.stages"
_FOLDER = Path(__file__).parents[1] / "stages"
_DECLARATION = "stage = Stage(version=1, inputs={…}, produces=KIND, outputs=[FILE])"

CHECKPOINT_FILES = ("config.json", "checkpoint.json", "tokenizer.json", "tokenizer_config.json")
"""Outputs of a stage that makes a checkpoint, besides the weights."""
WEIGHTS_OR_ADAPTERS = "model.safetensors|adapters.safetensors"

Format = Literal["base", "chat"]
"""Formats of checkpoints: base models continue text, chat models answer."""
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Metric:
    """A number that a stage records."""

    name: str  # `*` stands for each of `names`: pass_at_*
    better: Direction | None = None  # the better direction; None: neither
    curve: bool = False  # whether it is also recorded during training
    names: Callable[[Any], Iterable[object]] | None = None  # config → what `*` stands for
    when: Callable[[Any], bool] = lambda step: True
    """Planned step (its `config`, `inputs`, `artifacts` and `format`) → whether it records the metric."""
    needs: str = ""
    """The condition `when` in words: "pretrain.keep=best"."""

    def __str__(self) -> str:
        return f"{self.better or 'neither'}{f' (needs {self.needs})' if self.needs else ''}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage declares, and where it is."""

    version: int  # raised by hand when a code change changes results
    inputs: Mapping[str, str] = field(default_factory=dict)  # role → kind of artifact
    optional_inputs: Mapping[str, str] = field(default_factory=dict)  # roles that a step may leave empty
    produces: str  # kind of the artifact
    outputs: Collection[str]  # files that must exist afterwards; of names separated by |, exactly one
    settings: type | None = None  # dataclass of a user's stage's own section, which has the stage's name
    reads: Collection[str] = ()  # other sections of the configuration that it reads; they are part of its key
    unread: Callable[[Collection[str], Format | None], Iterable[str]] = lambda filled, format: ()
    """(filled roles, format of its checkpoint) → sections and settings that such a step does not read, so that they
    are not in its key. A format of None is unknown: it may read the settings of both."""
    metrics: Collection[Metric] = ()
    uses_gpu: bool = False  # whether it computes on the GPU, of which there is one
    seeded: Literal["run", "data", "both", "no"] = "run"
    """Seeds that it uses, which are part of its key; "both": the run's, and the data's for what it validates on."""
    format: Format | None = None  # format of the checkpoint that it makes; None: unknown before it is made
    label: Callable[[Any], object] | None = None
    """Config → label in the artifact's name; None: the label of the first input."""
    memory: Callable[[Any, str, Any], Any] | None = None
    """(config, stage, sizes) → what its memory depends on (planning/memory.py)."""
    problems: Callable[[Any, Any, Any, Any], Iterable[str]] | None = None
    """(config, step, plan, sizes) → why a planned step cannot run."""

    name: str = ""  # name of its file; this and the following fields are set when the file is read
    path: Path = Path()
    module: str = ""  # dotted name of its module
    root: Path | None = None  # folder of the module; None: it is installed

    @property
    def config(self) -> tuple[str, ...]:
        """All sections that it reads, its own first."""
        return ((self.name,) if self.settings is not None else ()) + tuple(self.reads)

    @property
    def roles(self) -> dict[str, str]:
        """All roles, including optional ones."""
        return {**self.inputs, **self.optional_inputs}

    def metric(self, name: str) -> Metric | None:
        """Return the declaration of a metric, the longest that matches; None: it is not declared."""
        fitting = [each for each in self.metrics if fnmatchcase(name, each.name)]
        return max(fitting, key=lambda each: (each.name == name, len(each.name)), default=None)

    def seeds(self, seed: int, data_seed: int) -> dict[str, int]:
        """Return the seeds that are part of an artifact's key."""
        if self.seeded in ("no", "data"):
            return {"seed": data_seed} if self.seeded == "data" else {}
        # Before data_seed there was one seed; keys from then stay valid if both seeds are equal.
        of_data = {"data_seed": data_seed} if self.seeded == "both" and data_seed != seed else {}
        return {"seed": seed, **of_data}

    def missing_outputs(self, out: Path) -> list[str]:
        """Return promised files that a folder lacks, and alternatives of which it has too many."""
        wrong = (names for names in self.outputs if sum((out / name).exists() for name in names.split("|")) != 1)
        return [names.replace("|", " or ") for names in wrong]

    def load(self) -> Callable[[Any], None]:
        """Return the stage's `run`."""
        run: Callable[[Any], None] = import_module(self.module, self.root).run
        return run


class Stages(Mapping[str, Stage]):
    """Name → stage: ours, and those of a configuration."""

    def __init__(self, places: Iterable[str] = ()) -> None:
        """Find our stages, which are imported on demand, and those of `places`, folders (./my_stages) and modules."""
        self._ours = stage_files()
        self.own: dict[str, Stage] = {}
        """The stages of users."""
        for place in dict.fromkeys(places):
            for stage in _stages_at(place, Path.cwd()):
                other = self._ours.get(stage.name) or (self.own[stage.name].path if stage.name in self.own else None)
                if other is not None and other != stage.path:
                    raise ConfigError(f"two stages are called {stage.name}: {other} and {stage.path}. Rename one file")
                self.own[stage.name] = stage

    def __getitem__(self, name: str) -> Stage:
        if name in self._ours:
            return read_stage(self._ours[name], f"{_PACKAGE}.{name}")
        return self.own[name]

    def __iter__(self) -> Iterator[str]:
        yield from sorted([*self._ours, *self.own])

    def __len__(self) -> int:
        return len(self._ours) + len(self.own)


def stage_files() -> dict[str, Path]:
    """Return name → file of our stages."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.py")) if path.stem != "__init__"}


@cache
def read_stage(path: Path, module: str, root: Path | None = None) -> Stage:
    """Import a stage's file and return what it declares."""
    try:
        found = getattr(import_module(module, root), "stage", None)
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{path}: importing it failed ({type(error).__name__}: {error})") from None
    if not isinstance(found, Stage):
        raise ConfigError(f"{path} declares no stage; expected {_DECLARATION} from mlxchat.runner.stage")
    return replace(found, name=path.stem, path=path, module=module, root=root)


def best_of(stage: str, metric: str) -> Callable[..., float] | None:
    """Return min or max as the better direction of a stage's metric; None: neither, or unknown."""
    stages = Stages()
    found = stages[stage].metric(metric) if stage in stages else None  # else an artifact of other code
    choices: dict[str | None, Callable[..., float]] = {"minimize": min, "maximize": max}
    return choices.get(found.better) if found is not None else None


def _stages_at(place: str, root: Path) -> list[Stage]:
    """Return the stages of a folder or module, searched in `root` first; files that declare none are not imported."""
    module = place
    if "/" in place or place == ".":
        folder = Path(place).resolve()
        root, module = folder.parent, folder.name
        if not folder.is_dir():
            near = [f"./{each.name}" for each in folder.parent.glob("*/")]
            raise ConfigError(f"stages: there is no folder {place}.{suggest(place, near)}")
    found = []
    for name, file in _files_of(module, root):
        text = file.read_text(encoding="utf-8", errors="replace")
        if re.search(r"^VERSION\b", text, re.M) and re.search(r"^PRODUCES\b", text, re.M):
            raise ConfigError(f"{file} declares VERSION and PRODUCES, as up to version 0.2. Write {_DECLARATION}")
        if re.search(r"^stage\b", text, re.M):
            found.append(read_stage(file, name, root))
    if not found:
        where = f"no Python file of a folder ./{module} or module {module}"
        raise ConfigError(f"stages: {place} has no stage: {where} declares {_DECLARATION}")
    return found


def _files_of(module: str, root: Path) -> list[tuple[str, Path]]:
    """Return dotted name and file of a module, or of the modules of a package."""
    file = module_files(module, root).get(module)
    if file is not None and file.name != "__init__.py":
        return [(module, file)]
    # Users' folders may lack __init__.py.
    folder = root.joinpath(*module.split(".")) if file is None else file.parent
    return [(f"{module}.{each.stem}", each) for each in sorted(folder.glob("[!_]*.py"))]
