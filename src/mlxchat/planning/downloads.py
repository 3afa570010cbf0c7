"""Remote files that pending steps read: the files for `data fetch`, and their sizes for a plan."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlxchat.config.schema import Config, TaskItem
from mlxchat.config.wording import format_bytes
from mlxchat.runner.plan import PlannedStep

if TYPE_CHECKING:
    from pathlib import Path

    from mlxchat.hub.cache import HubFile
    from mlxchat.store.store import Store
    from mlxchat.tasks.downloads import HubSource, UrlSource

# Downloads of a host that the head of a plan names.
_NAMED = 2
# By repository, or by the file's name in an address. Used until a listing gives the exact numbers.
_APPROXIMATE_BYTES = {
    "HuggingFaceTB/smol-smoltalk": 970e6,
    "cais/mmlu": 51e6,
    "openai/gsm8k": 3e6,
    "allenai/ai2_arc": 1.3e6,
    "openai/openai_humaneval": 0.1e6,
    "eval_bundle.zip": 162e6,
    "words_alpha.txt": 4.2e6,
    "identity_conversations.jsonl": 2.5e6,
}


def find_sources(config: Config, plan: Iterable[PlannedStep]) -> tuple[list[HubSource], list[UrlSource]]:
    """Return what the tasks and CORE of pending steps read from the Hub and from other addresses."""
    from mlxchat.tasks import load_item, task_class
    from mlxchat.tasks.base import Task
    from mlxchat.tasks.downloads import HubSource, UrlSource

    sections = {name: getattr(config, name) for step in plan if not step.done for name in step.stage.config}
    # Bundled tasks need nothing, and reading their text takes seconds.
    items = [item for item in _task_items(sections) if task_class(item.task).needs is not Task.needs]
    found = [source for item in items for source in load_item(item).needs()]
    cores = [sections[section].core for section in ("eval", "pretrain") if section in sections]
    found += [UrlSource(core.bundle, core.sha256) for core in cores if core is not None and "://" in core.bundle]
    found = list(dict.fromkeys(found))
    hub = [source for source in found if isinstance(source, HubSource)]
    return hub, [source for source in found if isinstance(source, UrlSource)]


def find_files(
    config: Config, plan: Iterable[PlannedStep], store: Store, *, measure: bool
) -> tuple[dict[str, list[HubFile]], dict[str, str | None]]:
    """Return title → files of the Hub, and address → sha256 (None: unknown), that pending steps will read.

    With `measure` the corpus's validation files are fetched at once, to measure the characters per byte.
    """
    plan = [step for step in plan if not step.done]
    groups: dict[str, list[HubFile]] = {}
    if any(step.stage.name in ("corpus", "tokenizer", "pretrain") or "corpus" in step.inputs for step in plan):
        groups |= _corpus_files(config, plan, store, measure=measure)
    sources, addresses = find_sources(config, plan)
    for source in sources:
        groups[source.repository] = list(dict.fromkeys([*groups.get(source.repository, []), *source.files]))
    urls = {address.url: address.sha256 for address in addresses}
    if config.imported.repository is not None and any(_imports(step) for step in plan):
        from mlxchat.interop.importing import files_to_fetch

        groups[config.imported.repository] = files_to_fetch(config.imported)
    return groups, urls


def _corpus_files(config: Config, plan: list[PlannedStep], store: Store, *, measure: bool) -> dict[str, list[HubFile]]:
    """Return the files to read of a corpus on the Hub: validation, and as many others as the horizon needs."""
    if config.corpus.hub is None:
        return {}
    from mlxchat.data.sources import Corpus
    from mlxchat.planning.text import find_text_need

    corpus = Corpus.listed(config.corpus.hub, config.corpus.validation_documents)
    need = find_text_need(config, plan, store)
    files = corpus.files()[:1]
    if need is not None:
        known = need.known or corpus
        if measure and not known.is_measured:
            known, _, _ = corpus.measure()
        need = replace(need, known=known)
        files = known.first(need.chars)
        print(need)
    return {config.corpus.hub.repository: list(dict.fromkeys([*corpus.files("validation"), *files]))}


@dataclass(frozen=True)
class Download:
    """A repository or file that a plan would fetch."""

    host: str
    name: str
    """A repository of the Hub, or the file that an address names."""
    bytes: float | None
    """None: unknown without the network."""


def find_downloads(config: Config, plan: Iterable[PlannedStep], store: Store) -> list[Download]:
    """Return what pending steps would download, those of unknown size first, then the largest.

    The network is not used.
    """
    from mlxchat.data.sources import ESTIMATED_CHARS_PER_BYTE
    from mlxchat.hub.cache import endpoint, missing_bytes
    from mlxchat.hub.client import url_place
    from mlxchat.hub.listings import recorded_files
    from mlxchat.planning.text import find_text_need

    plan, hub = list(plan), urlsplit(endpoint()).netloc
    found: list[Download] = []
    need = find_text_need(config, plan, store)
    if need is not None and config.corpus.hub is not None:
        text = need.known.missing_bytes(need.chars) if need.known else need.chars / ESTIMATED_CHARS_PER_BYTE
        found.append(Download(hub, config.corpus.hub.repository, text))
    sources, urls = find_sources(config, plan)
    files: dict[str, set[HubFile] | None] = {}
    for source in sources:
        listed = recorded_files(source.repository, source.revision)
        if listed is None:
            files[source.repository] = None
        elif (known := files.setdefault(source.repository, set())) is not None:
            known |= {each for each in listed if fnmatch.fnmatchcase(each.path, source.pattern)}
    if config.imported.repository is not None and any(_imports(step) for step in plan):
        from mlxchat.interop.importing import files_to_fetch

        files[config.imported.repository] = set(files_to_fetch(config.imported))
    for name, known in files.items():
        size = _APPROXIMATE_BYTES.get(name) if known is None else missing_bytes(_to_fetch(known))
        found.append(Download(hub, name, size))
    for address in urls:
        if not url_place(address.url).exists():
            name = address.url.rpartition("/")[2]
            found.append(Download(urlsplit(address.url).netloc, name, _APPROXIMATE_BYTES.get(name)))
    found = [each for each in found if each.bytes is None or each.bytes > 0]
    return sorted(found, key=lambda each: -math.inf if each.bytes is None else -each.bytes)


def describe_downloads(downloads: list[Download]) -> str:
    """Return a description of the total size and of the largest downloads of each host."""
    hosts: dict[str, list[str]] = {}
    for each in downloads:
        size = "of unknown size" if each.bytes is None else format_bytes(each.bytes)
        hosts.setdefault(each.host, []).append(f"{each.name} {size}")
    places = []
    for host, names in hosts.items():
        more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        places.append(f"{host} ({', '.join([*names[:_NAMED], *more])})")
    total = sum(each.bytes or 0.0 for each in downloads)
    return f"{f'about {format_bytes(total)} ' if total else ''}from {', '.join(places)}" if places else "nothing"


def _to_fetch(files: Iterable[HubFile]) -> list[tuple[Path, int]]:
    """Return (place, bytes) of missing contents; files of equal content share one."""
    return list({file.blob: file.bytes for file in files if not file.is_there()}.items())


def _imports(step: PlannedStep) -> bool:
    return not step.done and step.stage.name == "imported"


def _task_items(value: Any) -> Iterator[TaskItem]:
    """Yield every task of the sections."""
    if isinstance(value, TaskItem):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _task_items(item)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _task_items(getattr(value, each.name))
