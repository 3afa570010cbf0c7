"""What pending steps read that the plan does not make: models, local files, a corpus's text, downloads."""

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mlxchat.config.pins import UNKNOWN
from mlxchat.config.schema import Config, CoreConfig, ImportConfig, TaskItem
from mlxchat.config.wording import format_bytes, format_count
from mlxchat.data.sources import ESTIMATED_CHARS_PER_BYTE, Corpus
from mlxchat.errors import ConfigError, DataError, MlxchatError
from mlxchat.hub import client
from mlxchat.hub.cache import HubFile, missing_bytes
from mlxchat.hub.client import recorded_files
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.store import Store
from mlxchat.tasks import load_item
from mlxchat.tasks.downloads import UrlSource

# Of nanochat's tokenizer of 65,536 tokens on FineWeb-Edu; later measured.
_ESTIMATED_CHARS_PER_TOKEN = 4.8
# Share of the tokens that packing=best_fit crops away: nanochat's figure for rows of 2,048. Other packings keep all.
_CROPPED_SHARE = 0.35
_MARGIN = 1.1
# The beginning of the text, which tables and baselines read: tokenizers' compression, the n-gram model.
LEAST_CHARS = 20_000_000


def check_inputs(config: Config, plan: list[PlannedStep]) -> None:
    """Check the inputs of pending steps: by their stages' forecasts (ConfigError), and conversations (DataError)."""
    sizes, problems = find_model_sizes(config, plan), list[str]()
    for step in plan:
        if not step.done and step.stage.problems is not None:
            problems += step.stage.problems(step.config, step, plan, sizes.get(step.name))
    if problems:
        raise ConfigError("\n".join(problems))
    faults: dict[str, dict[str, None]] = {}
    for place, item in _find(plan, TaskItem):
        if item.path is not None:
            try:
                len(load_item(item))
            except MlxchatError as error:  # a mixture and its validation often share a file
                faults.setdefault(str(error), {})[place] = None
    if faults:
        raise DataError("\n".join(f"{', '.join(places)}: {fault}" for fault, places in faults.items()))


_T = TypeVar("_T")


def _find(plan: Iterable[PlannedStep], kind: type[_T]) -> Iterator[tuple[str, _T]]:
    """Yield the place and the value of every part of this type in the settings of pending steps."""

    def inside(where: str, value: Any) -> Iterator[tuple[str, _T]]:
        if isinstance(value, kind):
            yield where, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from inside(f"{where}.{key}", item)
        elif is_dataclass(value):
            for field in fields(value):
                yield from inside(f"{where}.{field.name}", getattr(value, field.name))

    for step in plan:
        for name, section in {} if step.done else step.sections.items():
            yield from inside(name, section)


# Models


def find_model_sizes(config: Config, plan: Iterable[PlannedStep]) -> dict[str, GPTSizes]:
    """Return step → model sizes for steps that import, train or evaluate an existing model."""
    store = Store(Path(config.outputs))
    found: dict[str, GPTSizes] = {}
    for step in plan:  # inputs come first
        section, source = getattr(step.config, step.stage.name, None), step.inputs.get("checkpoint")
        is_imported = isinstance(section, ImportConfig) and step.done
        rid = step.rid if is_imported else step.artifacts.get("checkpoint", {}).get("rid")
        folder = store.find(str(rid)) if rid else None
        sizes = None
        if source is not None:
            sizes = found.get(source)
        elif folder is not None:
            sizes = sizes_of_folder(folder)
        elif isinstance(section, ImportConfig):
            from mlxchat.interop.importing import model_sizes  # tiktoken and NumPy would delay every plan

            sizes = model_sizes(section)
        if sizes is not None:
            found[step.name] = sizes
    return found


def sizes_of_folder(folder: Path) -> GPTSizes:
    """Return the sizes of the checkpoint in a folder, adapters included, without its weights."""
    from mlxchat.interop.names import sizes_from_hf  # yaml would delay every plan

    return sizes_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder.name)


# Text


@dataclass(frozen=True)
class TextNeed:
    """The text that pending steps read from a corpus on the Hub."""

    tokens: int  # tokens that the model trains on
    chars: float  # characters to read, with those that packing drops and a margin; at least what the tokenizer reads
    corpus: Corpus | None  # the corpus's files; None: they are not listed yet

    def __str__(self) -> str:
        text = f"text: {format_count(self.chars)} characters"
        if self.tokens:
            text += f" for {format_count(self.tokens)} tokens"
        if self.corpus is None:
            return f"{text}, about {format_bytes(self.chars / ESTIMATED_CHARS_PER_BYTE)} of files"
        files, every = self.corpus.first(self.chars), len(self.corpus.train)
        return f"{text} = {len(files):,} of {every:,} files, {format_bytes(missing_bytes(files))} to fetch"


def find_text_need(config: Config, plan: Iterable[PlannedStep], store: Store) -> TextNeed | None:
    """Return what pending steps will read; None: no corpus of the Hub, or no such step."""
    steps = {step.stage.name: step for step in plan}
    waiting = {name for name, step in steps.items() if reads_text(step)}
    if config.corpus.hub is None or not waiting:
        return None
    tokens = 0
    if "pretrain" in waiting:
        sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
        derived = derive_hyperparameters(config, sizes)
        tokens = derived.num_iterations * derived.batch_tokens
    made = {name: store.made(step.key) for name, step in steps.items() if step.done}
    metrics = (made.get("tokenizer") or {}).get("metrics", {})
    per_token = metrics.get("chars_per_token") or _ESTIMATED_CHARS_PER_TOKEN
    kept = 1 - _CROPPED_SHARE if config.pretrain.packing == "best_fit" else 1.0
    chars = max(tokens * per_token / kept * _MARGIN, LEAST_CHARS)
    if "tokenizer" in waiting and config.tokenizer.source == "train":
        chars = max(chars, config.tokenizer.max_chars * _MARGIN)
    place = store.find(steps["corpus"].rid) if "corpus" in made else None
    return TextNeed(tokens, chars, Corpus.recorded(config.corpus.hub) if place is None else Corpus.open(place))


def reads_text(step: PlannedStep) -> bool:
    """Return True for a pending step that reads the corpus."""
    return not step.done and (step.stage.name == "corpus" or "corpus" in step.inputs)


# Downloads


def find_files(
    config: Config, plan: Iterable[PlannedStep], store: Store, *, network: bool, measure: bool = False
) -> tuple[dict[str, list[HubFile] | None], dict[str, str | None]]:
    """Return repository → files of the Hub, and address → sha256 (None: unknown), that pending steps will read.

    Without `network`, files that no earlier command listed are None. With `measure` the corpus's validation files are
    fetched at once, to measure the characters per byte.
    """
    plan, hub = list(plan), config.corpus.hub
    groups: dict[str, list[HubFile] | None] = {}
    urls: dict[str, str | None] = {}
    need = find_text_need(config, plan, store)
    if need is not None and hub is not None:
        corpus = need.corpus
        if network and (corpus is None or not corpus.is_measured):
            corpus = Corpus.listed(hub, config.corpus.validation_documents)
            corpus = corpus.measure()[0] if measure else corpus
            print(replace(need, corpus=corpus))
        files = None if corpus is None else [*corpus.files("validation"), *corpus.first(need.chars)]
        groups[hub.repository] = files
    for source in dict.fromkeys(need for _, item in _find(plan, TaskItem) for need in load_item(item).needs()):
        if isinstance(source, UrlSource):
            urls[source.url] = source.sha256
            continue
        listed = source.files if network else recorded_files(source.repository, source.revision)
        files = listed and [file for file in listed if fnmatch.fnmatchcase(file.path, source.pattern)]
        before = groups.get(source.repository) or []
        groups[source.repository] = files and list(dict.fromkeys([*before, *files]))
    urls |= {core.bundle: core.sha256 for _, core in _find(plan, CoreConfig) if "://" in core.bundle}
    for _, imported in _find(plan, ImportConfig):
        if imported.repository is not None:
            from mlxchat.interop.importing import files_to_fetch

            groups[imported.repository] = files_to_fetch(imported)
    return groups, urls


def find_downloads(config: Config, plan: Iterable[PlannedStep], store: Store) -> dict[str, int | None]:
    """Return repository or file → bytes (None: unknown) that pending steps would download, without the network."""
    groups, urls = find_files(config, plan, store, network=False)
    found: dict[str, int | None] = {}
    for name, files in groups.items():
        found[name] = None if files is None else missing_bytes(files)
    found |= {url.rpartition("/")[2]: None for url in urls if not client.url_place(url).exists()}
    return {name: size for name, size in found.items() if size != 0}


def describe_downloads(downloads: Mapping[str, int | None]) -> str:
    """Return the known bytes together, and the names."""
    names = [f"{name} ({'size unknown' if size is None else format_bytes(size)})" for name, size in downloads.items()]
    total = sum(size or 0 for size in downloads.values())
    return f"{f'about {format_bytes(total)}: ' if total else ''}{', '.join(names)}" or "nothing"


def contents_of_bundle(config: CoreConfig, hash_of: Callable[[Path], str]) -> list[str]:
    """Return the sha256 of CORE's bundle, for a key: a file and a URL with equal contents give equal keys."""
    if "://" not in config.bundle:
        return [hash_of(Path(config.bundle))]
    return [client.find_content(config.bundle, config.sha256) or f"{UNKNOWN}{config.bundle}"]
