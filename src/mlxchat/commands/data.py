"""mlxchat data: download and show data of the Hub and of URLs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import Parser, count, positive
from mlxchat.config.table import aligned
from mlxchat.config.verbs import VERBS
from mlxchat.config.wording import format_bytes, format_count
from mlxchat.errors import ConfigError, DataError, PassingError, suggest, visible
from mlxchat.store.naming import latest, links, resolve
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from rich.console import Console

    from mlxchat.config.schema import Config, TaskItem
    from mlxchat.data.mixture import Mixture
    from mlxchat.data.tokenizer import Tokenizer


def data(parser: Parser) -> None:
    """Declare `mlxchat data`, which lists its verbs."""
    words = {verb.partition(" ")[2]: purpose for verb, (_, purpose) in VERBS.items() if verb.startswith("data ")}
    parser.take_names("|".join(words), about=aligned(words.items()), first=words)
    parser.set_defaults(main=_data)


def _data(options: Namespace) -> int:
    """Refuse settings between `data` and its verb."""
    raise ConfigError(f"expected mlxchat data {options.names[0]} [SETTINGS]: settings go before or after both words")


_FETCH = (
    "Fetch everything that the steps which are to run read from elsewhere: as much of the corpus as the horizon needs, "
    "the data of all tasks, CORE's bundle. What is there is not fetched again. For a single repository: hf download."
)


def fetch(parser: Parser) -> None:
    """Declare `mlxchat data fetch`."""
    parser.take_settings()
    parser.description = _FETCH
    add = parser.add_argument
    add("--workers", type=positive, default=4, metavar="N", help="parallel downloads (default: 4)")
    add("--dry-run", action="store_true", help="list everything without downloading")
    parser.set_defaults(main=_fetch)


def _fetch(options: Namespace) -> int:
    """Download what the settings need."""
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.hub.client import fetch_files, fetch_url
    from mlxchat.pipeline import plan_of
    from mlxchat.planning.inputs import find_files

    config = compose_config(*split_options(options.settings)).config
    store = Store(Path(config.outputs))
    groups, urls = find_files(config, plan_of(config, store), store, network=True, measure=not options.dry_run)
    for title, files in groups.items():
        if not files:
            continue
        left = sum(file.bytes for file in files if not file.is_there())
        size = format_bytes(sum(file.bytes for file in files))
        count = f"{len(files):,} {'file' if len(files) == 1 else 'files'}"
        print(f"{visible(title)} at {files[0].revision[:12]}: {count}, {size}, {format_bytes(left)} to fetch")
    for url in urls:
        print(visible(url))
    if options.dry_run:
        return 0
    every = list({file: None for files in groups.values() for file in files or ()})
    fetch_files(every, workers=options.workers)
    faults = []
    for url, sha256 in urls.items():
        try:
            fetch_url(url, sha256=sha256)
        except (DataError, PassingError) as error:  # continue with the other addresses
            faults.append(error)
    if faults:
        raise type(faults[0])("\n".join(map(str, faults)))
    size = format_bytes(sum(file.bytes for file in every))
    counts = {f"of the Hub ({size})": len(every), "of other addresses": len(urls)}
    told = [f"{count:,} file{'s' * (count != 1)} {what}" for what, count in counts.items() if count]
    print(f"everything is there: {', '.join(told)}" if told else "nothing to download")
    return 0


_STAGES = ("midtrain", "sft", "preference", "rl", "eval")
_EXAMPLES = """\
examples:
  mlxchat data show mixture=oct2025_sft -n 5
  mlxchat data show mixture=oct2025_mid --task spelling_bee --start 100
  mlxchat data show suite=chatcore --task humaneval
  mlxchat data show stage=midtrain experiment=speedrun_d20 --validation
  mlxchat data show '+sft.mixture.mine={task: jsonl, path: mine.jsonl}' --task mine
"""
_SAMPLED = 100
"""Number of conversations of a task that are rendered to estimate the mean length."""
_MARKS = ("⟦", "⟧")


def show(parser: Parser) -> None:
    """Declare `mlxchat data show`."""
    parser.take_settings()
    parser.use("mixture=NAME|suite=NAME|stage=midtrain|sft|preference|rl|eval [SETTINGS]")
    parser.epilog = _EXAMPLES
    parser.description = (
        "Show conversations as a model is trained on them or asked them (default: stage=sft). What is trained on is "
        f"green and underlined, and stands between {' '.join(_MARKS)} where there is no colour."
    )
    add = parser.add_argument
    add("-n", "--count", type=count, default=3, help="number of conversations (default: 3)")
    add("--start", type=count, default=0, help="index of the first one, from 0")
    add("--task", help="only conversations of this task")
    add("--seed", type=int, help="order of this seed (default: the order of training)")
    add("--validation", action="store_true", help="show the stage's validation data")
    add("--tokenizer", metavar="ID|FOLDER", help="artifact or folder of the tokenizer (default: the latest one)")
    parser.set_defaults(main=_show)


def _show(options: Namespace) -> int:
    """Print the number of conversations of each task, and the first ones in the order of training."""
    from mlxchat.composition.compose import compose_config, split_config_dirs
    from mlxchat.runner.context import stage_seed

    settings, dirs = split_config_dirs(options.settings)
    title, stage, overrides = _aim(settings)
    config = compose_config(overrides, dirs).config
    items = _items(config, stage, is_validation=options.validation)
    if options.task is not None and options.task not in items:
        raise ConfigError(f'there is no "{options.task}" in {title}: {", ".join(items)}.{suggest(options.task, items)}')

    from rich.console import Console

    from mlxchat.data.mixture import Mixture

    # Seeds of the stages' orders.
    purpose = "validation" if options.validation else "mixture"
    root = config.data_seed if options.validation else config.seed
    seed = stage_seed(root, stage, purpose) if options.seed is None else options.seed
    tokenizer, which = _find_tokenizer(Store(Path(config.outputs)), config, options.tokenizer)
    is_mixture = stage in ("midtrain", "sft") and not options.validation
    mixture = Mixture(items, seed=seed, order=getattr(config, stage).mixture_order if is_mixture else None)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    heading = f"{title}{' (validation)' if options.validation else ''}: {len(mixture):,} conversations, {which}"
    console.print(heading, style="bold")
    _print_table(console, mixture, tokenizer)
    if any(task.is_paired for task in mixture.tasks().values()):
        console.print("of pairs the chosen answers are shown")
    elif stage in ("preference", "rl", "eval"):
        console.print("marked is the data's own answer, which a model that is asked does not see")
    if stage in ("midtrain", "sft") and getattr(config, stage).train_on == "all":
        console.print(f"{stage} trains on every token ({stage}.train_on=all), not only on what is marked")
    chosen = (each for each in range(len(mixture)) if options.task is None or mixture.task_of(each) == options.task)
    for index in islice(chosen, options.start, options.start + options.count):
        _print_conversation(console, mixture, index, tokenizer)
    return 0


def _aim(settings: list[str]) -> tuple[str, str, list[str]]:
    """Return a title, the stage whose data is shown, and the settings to compose."""
    chosen = dict(word.split("=", 1) for word in settings if word.startswith(("mixture=", "suite=", "stage=")))
    overrides = [word for word in settings if not word.startswith(("mixture=", "suite=", "stage="))]
    if "suite" in chosen and ("mixture" in chosen or chosen.get("stage", "eval") != "eval"):
        raise ConfigError("suite= shows the questions of eval: it excludes mixture= and stage=")
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
    rl, pairs = config.rl, config.preference
    if stage == "rl":
        return {"evaluation": rl.evaluation} if is_validation else {"task": rl.task}
    if stage == "preference":
        return {"validation": pairs.validation} if is_validation else {"data": pairs.data}
    if stage == "eval":
        return config.suite
    section = config.midtrain if stage == "midtrain" else config.sft
    return section.validation if is_validation else section.mixture


def _find_tokenizer(store: Store, config: Config, named: str | None) -> tuple[Tokenizer, str]:
    """Return a tokenizer and its description."""
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
    # One token per byte: shows the same text; only the numbers of tokens are larger.
    return Tokenizer({bytes([byte]): byte for byte in range(256)}), (
        f"tokens are bytes, since {store.outputs} has no tokenizer yet (--tokenizer names one)"
    )


def _print_table(console: Console, mixture: Mixture, tokenizer: Tokenizer) -> None:
    """Print the number and lengths of each task's conversations; sampled means are marked with ~."""
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
    """Print a conversation with its special tokens; marks enclose trained tokens."""
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
    """Yield maximal runs of ids that agree in being trained and in being special."""
    special = set(tokenizer.special_ids.values())
    kinds = ((trained, token in special, token) for token, trained in zip(ids, mask, strict=True))
    for kind, run in groupby(kinds, key=lambda each: each[:2]):
        yield [token for _, _, token in run], *kind
