"""mlxchat data show: conversations of a mixture, suite or stage as the model will see them, and how many there are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import Parser
from mlxchat.composition.compose import compose_config, split_config_dirs
from mlxchat.config.schema import Config, TaskItem
from mlxchat.config.wording import format_count
from mlxchat.errors import ConfigError, suggest, visible
from mlxchat.runner.seeds import stage_seed
from mlxchat.store.naming import latest, links, resolve
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from rich.console import Console

    from mlxchat.data.mixture import Mixture
    from mlxchat.data.tokenizer import Tokenizer

_STAGES = ("midtrain", "sft", "rl", "eval")
_EXAMPLES = """\
examples:
  mlxchat data show mixture=oct2025_sft -n 5
  mlxchat data show mixture=oct2025_mid --task spelling_bee --start 100
  mlxchat data show suite=chatcore --task humaneval
  mlxchat data show stage=midtrain experiment=speedrun_d20 --validation
  mlxchat data show '+sft.mixture.mine={task: jsonl, path: mine.jsonl}' --task mine
"""
_SAMPLED = 100
"""Conversations of a task that are rendered to tell how long its conversations are."""
_MARKS = ("⟦", "⟧")


def main(arguments: list[str]) -> int:
    """Print how many conversations there are of each task, and the first of them in the order of training."""
    parser = Parser(
        prog="mlxchat data show", allow_abbrev=False, epilog=_EXAMPLES,
        description="Show conversations as a model is trained on them or asked them. What is trained on is green and "
        f"underlined, and stands between {' '.join(_MARKS)} where there is no colour.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING",
        help="mixture=NAME, suite=NAME, stage=midtrain|sft|rl|eval, and any other setting (default: stage=sft)",
    )  # fmt: skip
    parser.add_argument("-n", "--count", type=int, default=3, help="conversations to show (default: 3)")
    parser.add_argument("--start", type=int, default=0, help="the first of them, counted from 0")
    parser.add_argument("--task", help="only those of this entry")
    parser.add_argument("--seed", type=int, help="order of another seed (default: the order of training)")
    parser.add_argument("--validation", action="store_true", help="what the stage is validated on, not trained on")
    parser.add_argument("--tokenizer", metavar="ID|FOLDER", help="an artifact or folder (default: the latest one)")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="further YAML files")
    options = parser.parse_intermixed_args(arguments)
    if options.count < 0 or options.start < 0:
        raise ConfigError("-n and --start must be at least 0")
    title, stage, overrides = _aim(options.settings)

    dirs = split_config_dirs([word for folder in options.config_dir for word in ("--config-dir", folder)])[1]
    config = compose_config(overrides, dirs).config
    items = _items(config, stage, is_validation=options.validation)
    if options.task is not None and options.task not in items:
        raise ConfigError(f'there is no "{options.task}" in {title}: {", ".join(items)}.{suggest(options.task, items)}')

    from rich.console import Console

    from mlxchat.data.mixture import Mixture

    # As the stages draw their orders.
    purpose = "validation" if options.validation else "mixture"
    root = config.data_seed if options.validation else config.seed
    seed = stage_seed(root, stage, purpose) if options.seed is None else options.seed
    tokenizer, which = _find_tokenizer(Store(Path(config.outputs)), config, options.tokenizer)
    mixture = Mixture(items, seed=seed)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    heading = f"{title}{' (validation)' if options.validation else ''}: {len(mixture):,} conversations, {which}"
    console.print(heading, style="bold")
    _print_table(console, mixture, tokenizer)
    if stage in ("rl", "eval"):
        console.print("marked is the data's own answer, which a model that is asked does not see")
    if _trains_on_all(config, stage):
        console.print(f"{stage} trains on every token ({stage}.train_on=all), not only on what is marked")
    for index in islice(_choose(mixture, options.task), options.start, options.start + options.count):
        _print_conversation(console, mixture, index, tokenizer)
    return 0


def _aim(settings: list[str]) -> tuple[str, str, list[str]]:
    """Return what is shown in words, the stage that it is for, and the settings to compose."""
    chosen = dict(word.split("=", 1) for word in settings if word.startswith(("mixture=", "suite=", "stage=")))
    overrides = [word for word in settings if not word.startswith(("mixture=", "suite=", "stage="))]
    if "suite" in chosen and ("mixture" in chosen or chosen.get("stage", "eval") != "eval"):
        raise ConfigError("suite= is what eval asks: it goes with neither mixture= nor another stage=")
    stage = chosen.get("stage", "eval" if "suite" in chosen else "sft")
    if stage not in _STAGES:
        raise ConfigError(f'stage is "{stage}", expected one of {", ".join(_STAGES)}.{suggest(stage, _STAGES)}')
    if "mixture" in chosen:
        if stage not in ("midtrain", "sft"):
            raise ConfigError(f"mixture= is for midtrain and sft, not for {stage}")
        return f"mixture {chosen['mixture']}", stage, [f"mixture@{stage}.mixture={chosen['mixture']}", *overrides]
    if "suite" in chosen:
        return f"suite {chosen['suite']}", stage, [f"suite={chosen['suite']}", *overrides]
    return f"stage {stage}", stage, overrides


def _items(config: Config, stage: str, *, is_validation: bool) -> Mapping[str, TaskItem]:
    if stage == "rl":
        return {"evaluation": config.rl.evaluation} if is_validation else {"task": config.rl.task}
    if stage == "eval":
        return config.suite
    section = config.midtrain if stage == "midtrain" else config.sft
    return section.validation if is_validation else section.mixture


def _trains_on_all(config: Config, stage: str) -> bool:
    return stage in ("midtrain", "sft") and getattr(config, stage).train_on == "all"


def _find_tokenizer(store: Store, config: Config, named: str | None) -> tuple[Tokenizer, str]:
    """Return a tokenizer, and what to say of it."""
    from mlxchat.data.tokenizer import Tokenizer

    if named is not None:
        folder = Path(named)
        place = folder if (folder / "tokenizer.json").is_file() else resolve(store, named)
        if not (place / "tokenizer.json").is_file():
            raise ConfigError(f"{place.name} has no tokenizer; give a tokenizer, a checkpoint, or a folder of one")
        return Tokenizer.load(place), f"tokens of {place.name}"
    steps = [step for step, node in config.pipeline.items() if node.get("stage") == "tokenizer"]
    made = links(store, latest(store))
    for step in steps:
        if step in made:
            return Tokenizer.load(made[step]), f"tokens of {made[step].name}"
    # One token for each byte: what is shown is the same, only the numbers are larger.
    return Tokenizer({bytes([byte]): byte for byte in range(256)}), (
        f"tokens are bytes, since {store.outputs} has no tokenizer yet (--tokenizer names one)"
    )


def _choose(mixture: Mixture, task: str | None) -> Iterator[int]:
    return (index for index in range(len(mixture)) if task is None or mixture.task_of(index) == task)


def _print_table(console: Console, mixture: Mixture, tokenizer: Tokenizer) -> None:
    """Print how many conversations there are of each task, and how long they are; means of a sample have a ~."""
    from rich import box
    from rich.table import Table

    from mlxchat.data.conversation import render_conversation

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    for column in ("conversations", "share", "tokens each", "trained", "tokens"):
        table.add_column(column, justify="right")
    total, is_sampled = 0.0, False
    tasks, counts = mixture.tasks(), mixture.counts()
    for name, task in tasks.items():
        places = range(0, len(task), max(1, -(-len(task) // _SAMPLED)))
        masks = [render_conversation(tokenizer, task[place], max_tokens=None)[1] for place in places]
        mean = sum(map(len, masks)) / len(masks)
        trained = sum(map(sum, masks)) / max(1, sum(map(len, masks)))
        about = "~" if len(places) < len(task) else ""
        is_sampled = is_sampled or bool(about)
        total += mean * counts[name]
        share = counts[name] / len(mixture)
        table.add_row(
            name, f"{counts[name]:,}", f"{share:.1%}", f"{about}{mean:,.0f}", f"{about}{trained:.0%}",
            f"{about}{format_count(mean * counts[name])}",
        )  # fmt: skip
    table.add_section()
    about = "~" if is_sampled else ""
    table.add_row(
        "all", f"{len(mixture):,}", "", f"{about}{total / len(mixture):,.0f}", "", f"{about}{format_count(total)}"
    )
    console.print(table)


def _print_conversation(console: Console, mixture: Mixture, index: int, tokenizer: Tokenizer) -> None:
    """Print a conversation, special tokens included, with what is trained on marked."""
    from rich.text import Text

    from mlxchat.data.conversation import render_conversation

    ids, mask = render_conversation(tokenizer, mixture[index], max_tokens=None)
    console.print(
        Text(f"── {index} · {mixture.name(index)} · {len(ids):,} tokens, {sum(mask):,} trained", style="bold cyan")
    )
    is_plain = console.no_color or not console.is_terminal
    text, before = Text(), 0
    for run, trained, is_special in _runs(ids, mask, tokenizer):
        if is_plain and trained != before:
            text.append(_MARKS[0] if trained else _MARKS[1])
        style = " ".join(["green underline"] * trained + ["dim"] * is_special)
        text.append(visible(tokenizer.decode(run)), style=style)
        before = trained
    if is_plain and before:
        text.append(_MARKS[1])
    console.print(text, end="\n\n")


def _runs(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int, bool]]:
    """Yield stretches of ids that are trained on alike and are all special, or none of them."""
    special = set(tokenizer.special_ids.values())
    run: list[int] = []
    kind: tuple[int, bool] | None = None
    for token, trained in zip(ids, mask, strict=True):
        this = (trained, token in special)
        if kind is not None and this != kind:
            yield run, *kind
            run = []
        kind = this
        run.append(token)
    if kind is not None:
        yield run, *kind
