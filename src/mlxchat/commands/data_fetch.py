"""mlxchat data fetch: everything that a run will read from elsewhere, so that it can run without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.commands.arguments import Parser, split_words
from mlxchat.commands.needs import find_sources
from mlxchat.composition.compose import Composed, compose_config, split_options
from mlxchat.config.wording import format_bytes
from mlxchat.errors import DataError, PassingError, visible

if TYPE_CHECKING:
    from mlxchat.config.schema import Config
    from mlxchat.hub.client import HubFile
    from mlxchat.runner.plan import PlannedStep
    from mlxchat.store.store import Store

_PURPOSE = (
    "Fetch everything that the steps which are to run read from elsewhere: as much of the corpus as the horizon needs, "
    "the data of all tasks, CORE's bundle. Or a repository: mlxchat data fetch openai/gsm8k --files 'main/*'. What is "
    "there is not fetched again; what was cut is continued."
)


def main(arguments: list[str]) -> int:
    """Fetch what the settings need, or the repositories that are named."""
    parser = Parser(
        prog="mlxchat data fetch", description=_PURPOSE, allow_abbrev=False,
        usage="mlxchat data fetch [OPTIONS] [SETTINGS | REPOSITORY…]",
    )  # fmt: skip
    parser.add_argument(
        "--files", default="*", metavar="PATTERN", help="of a repository: paths to fetch (default: all)"
    )
    parser.add_argument("--revision", default="main", help="of a repository: commit, tag or branch (default: main)")
    parser.add_argument("--model", action="store_true", help="the repository holds a model, not a data set")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="files at a time (default: 4)")
    parser.add_argument("--dry-run", action="store_true", help="list everything and fetch nothing")
    options, rest = parser.parse_known_args(arguments)
    words, dirs, primary = split_options(rest)
    repositories, settings = split_words(words)
    from mlxchat.hub.client import fetch_files, fetch_url, list_files

    urls: dict[str, str | None] = {}
    groups: dict[str, list[HubFile]] = {}
    if repositories:
        kind = "model" if options.model else "dataset"
        for name in repositories:
            groups[name] = list_files(name, revision=options.revision, pattern=options.files, kind=kind)
            if not groups[name]:
                raise DataError(f"{name} at {options.revision} has no file like {options.files}")
    else:
        groups, urls = find_needs(compose_config(settings, dirs, primary), measure=not options.dry_run)
    for title, files in groups.items():
        left = sum(file.bytes for file in files if not file.is_there())
        size = format_bytes(sum(file.bytes for file in files))
        count = f"{len(files):,} {'file' if len(files) == 1 else 'files'}"
        print(f"{visible(title)} at {files[0].revision[:12]}: {count}, {size}, {format_bytes(left)} to fetch")
    for url in urls:
        print(visible(url))
    if options.dry_run:
        return 0
    every = list({file: None for files in groups.values() for file in files})
    fetch_files(every, workers=options.workers)
    faults = []
    for url, sha256 in urls.items():
        try:
            fetch_url(url, sha256=sha256)
        except (DataError, PassingError) as error:  # one address that is gone must not keep the others from us
            faults.append(error)
    if faults:
        raise type(faults[0])("\n".join(map(str, faults)))
    for name in repositories:
        print(f"{name} is in {groups[name][0].folder / 'snapshots' / groups[name][0].revision}")
    counts = {
        f"of the Hub ({format_bytes(sum(file.bytes for file in every))})": len(every),
        "of other addresses": len(urls),
    }
    told = [f"{count:,} file{'s' * (count != 1)} {what}" for what, count in counts.items() if count]
    print(f"everything is there: {', '.join(told)}" if told else "nothing is needed from elsewhere")
    return 0


def find_needs(composed: Composed, *, measure: bool) -> tuple[dict[str, list[HubFile]], dict[str, str | None]]:
    """Return title → files of the Hub, and address → sha256 (None: not known), that the steps to run will read.

    With `measure` the corpus's validation files are fetched at once, to count characters by them instead of guessing.
    """
    from mlxchat.store.store import Store
    from mlxchat.sweep.job import plan_of

    config = composed.config
    store = Store(Path(config.outputs))
    plan = [step for step in plan_of(config, store) if not step.done]
    groups: dict[str, list[HubFile]] = {}
    if any(step.stage.name in ("corpus", "tokenizer", "pretrain") or "corpus" in step.inputs for step in plan):
        groups |= _corpus_files(config, plan, store, measure=measure)
    sources, addresses = find_sources(config, plan)
    for source in sources:
        groups[source.repository] = list(dict.fromkeys([*groups.get(source.repository, []), *source.files]))
    urls = {address.url: address.sha256 for address in addresses}
    if config.imported.repository is not None and any(step.stage.name == "imported" for step in plan):
        from mlxchat.interop.importing import files_to_fetch

        groups[config.imported.repository] = files_to_fetch(config.imported)
    return groups, urls


def _corpus_files(config: Config, plan: list[PlannedStep], store: Store, *, measure: bool) -> dict[str, list[HubFile]]:
    """Return what is read of a corpus on the Hub: the validation files, and as many others as the horizon needs."""
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
