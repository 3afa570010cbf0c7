"""What the steps that are to run read from elsewhere: by name for `data fetch`, by bytes for the head of a plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.compose import Composed
from mlxchat.config import Config, TaskItem
from mlxchat.overrides import implied_experiment
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.progress import format_bytes, format_seconds

if TYPE_CHECKING:
    from mlxchat.runner.store import Store
    from mlxchat.tasks.downloads import HubSource, UrlSource

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
    """Return what the tasks and CORE of the steps that are not done read from the Hub and from plain addresses."""
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


@dataclass(frozen=True, kw_only=True)
class Downloads:
    """What a plan would download, as far as it is known without a network."""

    text_bytes: float
    """Of the corpus."""
    task_bytes: float
    """Of tasks and CORE."""
    unknown: list[str]
    """Repositories and addresses whose size is not known."""

    def __str__(self) -> str:
        """For people."""
        parts = {"of text": self.text_bytes, "of tasks and CORE": self.task_bytes}
        known = [f"{format_bytes(count)} {what}" for what, count in parts.items() if count]
        total = f"about {format_bytes(sum(parts.values()))} ({', '.join(known)})" if known else "nothing of known size"
        return total + (f", and {', '.join(self.unknown)} of unknown size" if self.unknown else "")


def find_downloads(config: Config, plan: Iterable[PlannedStep], store: Store) -> Downloads | None:
    """Return what the steps that are not done would download; None: nothing. The network is not used.

    Models to import are not counted: the plan's line of that step describes them.
    """
    from mlxchat.data.sources import ESTIMATED_CHARS_PER_BYTE
    from mlxchat.hub.cache import missing_bytes
    from mlxchat.hub.client import url_place
    from mlxchat.hub.listings import recorded_files
    from mlxchat.planning.text import find_text_need

    plan = list(plan)
    text, tasks, unknown = 0.0, 0.0, dict[str, None]()
    need = find_text_need(config, plan, store)
    if need is not None:
        text = need.known.missing_bytes(need.chars) if need.known else need.chars / ESTIMATED_CHARS_PER_BYTE
    sources, urls = find_sources(config, plan)
    missing: dict[str, float | None] = {}
    listed: dict[Path, int] = {}
    for source in sources:
        files = recorded_files(source.repository, source.revision)
        if files is None:
            missing[source.repository] = _APPROXIMATE_BYTES.get(source.repository)
        else:
            matching = [file for file in files if fnmatch.fnmatchcase(file.path, source.pattern)]
            listed |= {file.blob: file.bytes for file in matching if not file.is_there()}
    for address in urls:
        if not url_place(address.url).exists():
            missing[address.url] = _APPROXIMATE_BYTES.get(address.url.rpartition("/")[2])
    tasks = missing_bytes(listed.items()) + sum(size for size in missing.values() if size is not None)
    unknown |= dict.fromkeys(name for name, size in missing.items() if size is None)
    return Downloads(text_bytes=text, task_bytes=tasks, unknown=list(unknown)) if text or tasks or unknown else None


def describe_recipe(
    composed: Composed, plan: list[PlannedStep], store: Store, downloads: Downloads | None
) -> Iterator[str]:
    """Yield the lines before a plan: the implied recipe, its downloads, its time, and what works without a network.

    Nothing is yielded for a plan that downloads nothing and whose experiment was not implied.
    """
    implied = implied_experiment(composed.overrides)
    waiting = [step for step in plan if not step.done]
    if not waiting or not (implied or downloads):
        return
    config = composed.config
    if implied:
        quick = f"experiment=quickstart model=d{config.model.depth}"
        yield f"recipe: {implied[0]}, implied by model=. The default recipe at this depth: {quick}"
    if downloads:
        yield f"downloads: {downloads}"
        if implied:
            yield "without a network: add corpus=bundled, which takes bundled text and tasks and downloads nothing"
    else:
        yield (
            "downloads: nothing. Bundled text, tasks and a vocabulary of "
            f"{config.tokenizer.vocab_size:,} stand in for nanochat's"
        )
    if any(step.stage.name == "pretrain" for step in waiting):
        from mlxchat.planning.duration import estimate_pretraining

        seconds = [each.seconds for each in estimate_pretraining(config, plan, store, measure=True).values()]
        yield f"pretraining on this machine: {_how_long(seconds)}"


def _how_long(seconds: list[float]) -> str:
    if not seconds:
        return "not known; `mlxchat bench train` measures its speed"
    days = sum(seconds) / 86400
    return f"about {days / 365:.1f} years" if days > 730 else f"about {format_seconds(sum(seconds))}"


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
