"""Verbs that read an outputs folder: status, ls, show, lineage, diff, verify."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser, draw_tree, positive, print_json, show_value, when
from mlxchat.config.wording import aligned, format_bytes, format_count, format_number, format_seconds, plural
from mlxchat.errors import StoreError, visible
from mlxchat.store import locks
from mlxchat.store.catalog import Summary, read_catalog
from mlxchat.store.files import Records, list_folder
from mlxchat.store.manifest import MANIFEST, SHARED_KIND, Manifest, read_manifest
from mlxchat.store.naming import LATEST, Run, find_all, groups, latest, links, meaning, resolve
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.store.catalog import Node

Row = dict[str, Any]


def status(parser: Parser) -> None:
    parser.take_names("[RUN]", least=0)
    parser.add_json()
    parser.add_argument("--cancel", action="store_true", help="end all jobs in queues and on clusters; they save first")


def _status(options: Namespace) -> int:
    """Print jobs, running steps, failures, and the finished steps of a run."""
    store = Store(options.outputs)
    run = latest(store)
    if options.names:
        meant = meaning(store, options.names[0])
        if not isinstance(meant, Run):
            raise StoreError(f'"{options.names[0]}" is {meant.place.name}, not a run. See: mlxchat show ID')
        run = meant.name
    jobs = [*_describe_jobs(store, cancel=options.cancel)]
    in_jobs = {row["record"] for row in jobs}
    work = [_describe_work(store, key) for key in list_folder(store.outputs / "work")]
    work = [row for row in work if row["state"] == "running" or row["key"] not in in_jobs]
    done = [_describe_done(step, place) for step, place in links(store, run).items()]
    done.sort(key=lambda row: str(row.get("published", "")))
    if options.json:
        found = {"outputs": str(store.outputs), "work": work, "jobs": jobs, "latest": latest(store), "run": run}
        print_json({**found, "done": done})
        return 0
    of_latest = "latest run: " if run == latest(store) else ""
    sections = {
        "jobs": [[row["step"], f"{row['job']} {row['state']} (run {row['run']})"] for row in jobs],
        "not done": [[row["step"], *_words_of_work(row)] for row in work],
        f"done ({of_latest}{run})": [_cells_of_step(row) for row in done],
    }
    for title, rows in sections.items():
        if rows:
            print(visible(f"{title}\n{aligned(rows, indent='  ')}"))
    if not any(sections.values()):
        print(store.lacking("runs"))
    return 0


def _describe_jobs(store: Store, *, cancel: bool) -> Iterator[Row]:
    """Yield the jobs of steps and sweeps in queues and on clusters, after cancelling them if requested."""
    from mlxchat.runner.executors import attach

    for path in sorted(store.jobs.glob("*.jsonl")):
        if (job := attach(path)) is None:
            continue
        if cancel:
            job.cancel()
        facts = job.facts
        yield {
            "job": job.name, "step": facts.get("step", path.stem), "run": facts.get("run"),
            "state": "is cancelled" if cancel else job.describe(), "submitted": facts["submitted"],
            "log": facts.get("log"), "record": path.stem,
        }  # fmt: skip


def _describe_work(store: Store, key: str) -> Row:
    """Return a step's process or the end of its last attempt, and its progress."""
    folder = store.work(key)
    executions = locks.read_attempts(folder)
    last = executions[-1] if executions else {}
    held = locks.is_held(store.lock(key))
    known = last | (locks.read_owner(store.lock(key)) if held else {})
    trained = Records(folder / "ckpt" / "records" / "metrics.jsonl").last()
    log = store.outputs / "runs" / str(last.get("run")) / f"{last.get('step')}-error.log"
    return {
        "state": "running" if held else str(last.get("outcome", "never started")), "step": known.get("step", key[:16]),
        "key": key, "run": known.get("run"), "pid": known.get("pid"), "host": known.get("host"),
        "started": last.get("started"), "attempts": len(executions), "iteration": trained.get("iteration"),
        "loss": trained.get("loss"), "tokens_per_second": trained.get("tokens_per_second"), "error": last.get("error"),
        "log": str(log) if log.exists() else None,
    }  # fmt: skip


def _words_of_work(row: Row) -> list[str]:
    """Return the state of a running or unfinished step, and what is known about it."""
    at = f" at iteration {row['iteration']}" if row["iteration"] is not None else ""
    if row["state"] == "running":
        about = f"process {row['pid']} on {row['host']} (run {row['run']}), since {when(row['started'] or '')}"
    else:
        tries = f"attempt {row['attempts']}" if row["attempts"] > 1 else ""
        log = f"log: {row['log']}" if row["log"] else ""
        about = ", ".join(filter(None, [row["error"], tries, log]))
    return [f"{row['state']}{at}", about]


def _describe_done(step: str, place: Path) -> Row:
    try:
        manifest = read_manifest(place)
    except StoreError:
        return {"step": step, "artifact": place.name, "damaged": True}
    size = sum(file["bytes"] for file in manifest["outputs"])
    about = {key: manifest[key] for key in ("rid", "seconds", "published")}
    return {"step": step, "artifact": place.name, "bytes": size, **about}


def _cells_of_step(row: Row) -> list[str]:
    if row.get("damaged"):
        return [row["step"], row["artifact"], "damaged: see mlxchat verify"]
    size, seconds = format_bytes(row["bytes"]), format_seconds(row["seconds"] or 0)
    return [row["step"], row["artifact"], size, seconds, when(row["published"])]


def ls(parser: Parser) -> None:
    parser.take_names("[STAGE|STEP|RUN…]", least=0, most=None)
    parser.add_json("one JSON array for programs")


def _ls(options: Namespace) -> int:
    """Print a line per artifact, newest last; encoded text is only counted unless it is named."""
    store, wanted = Store(options.outputs), options.names
    found = read_catalog(store)
    known = {str(summary.get(key)) for summary in found for key in ("stage", "step") if summary.get(key)}
    of_runs = {place.name for each in wanted if each not in known for place in find_all(store, each)}
    shown = found
    if wanted:
        chosen = {*wanted}
        shown = [each for each in found if {each.get("stage"), each.get("step")} & chosen or each["folder"] in of_runs]
    if options.json:
        print_json(shown)
        return 0
    encoded = [summary for summary in shown if summary.get("kind") == SHARED_KIND and SHARED_KIND not in wanted]
    if listed := [summary for summary in shown if summary not in encoded]:
        print(aligned([_row_of(summary) for summary in listed], right=(3, 4)))
    if encoded:
        size = format_bytes(sum(summary["bytes"] for summary in encoded))
        print(f"and {plural(len(encoded), 'folder')} of encoded text, {SHARED_KIND}-* ({size})")
    if not found:
        print(store.lacking("artifacts"))
    return 0


def _row_of(summary: Summary) -> list[str]:
    if "damaged" in summary:
        return ["damaged         ", summary["folder"], "-", "-", "-", "its manifest cannot be read: see mlxchat verify"]
    numbers = [f"{key} {format_number(value)}" for key, value in list(summary["metrics"].items())[:3]]
    size, seconds = format_bytes(summary["bytes"]), format_seconds(summary["seconds"] or 0)
    return [when(summary["published"]), summary["folder"], str(summary["step"]), size, seconds, "  ".join(numbers)]


EXAMPLES = ("wrong", "right", "all")


def show(parser: Parser) -> None:
    parser.take_names("ID")
    add, examples = parser.add_argument, "questions and answers of an evaluation or RL"
    add("--examples", nargs="?", choices=EXAMPLES, const="all", help=examples)
    add("-n", type=positive, default=5, metavar="N", help="number of examples (default: 5)")
    add("--task", metavar="NAME", help="for an evaluation: only examples of this task")
    add("--iteration", type=int, metavar="N", help="for RL: only answers of this iteration")
    add("--samples", action="store_true", help="what a training wrote on its prompts, also during it")
    parser.add_json("the manifest, unchanged; with --samples a list of them")


def _show(options: Namespace) -> int:
    """Print an artifact's manifest, the examples of an evaluation or RL, or samples."""
    store = Store(options.outputs)
    if options.samples:
        from mlxchat.commands.evaluate import show_samples

        return show_samples(store, options.names[0], as_json=options.json)
    place = resolve(store, options.names[0])
    if options.examples is not None:
        from mlxchat.commands.evaluate import show_examples  # slow imports

        return show_examples(place, options)
    manifest = read_manifest(place)
    if options.json:
        print_json(manifest)
        return 0
    print(place.name)
    print(aligned(_facts(store, place, manifest), indent="  "))
    for title, rows in _sections(manifest):
        if rows:
            print(f"{title}\n{aligned(rows, indent='  ')}")
    return 0


def _facts(store: Store, place: Path, manifest: Manifest) -> Iterator[list[str]]:
    yield ["id", manifest["rid"]]
    yield ["step", f"{manifest['step']} (stage {manifest['stage']}, version {manifest['version']})"]
    attempts = manifest.get("attempts", ())
    hosts = ", ".join(dict.fromkeys(str(attempt.get("host")) for attempt in attempts))
    yield ["made", f"{when(manifest['published'])} in {format_seconds(manifest['seconds'] or 0)}"]
    yield ["attempts", f"{len(attempts)} on {hosts}"]
    yield ["run", str(manifest.get("run"))]
    yield ["settings", " ".join(manifest.get("overrides") or ())]
    yield ["size", format_bytes(sum(file["bytes"] for file in manifest["outputs"]))]
    yield ["folder", str(place)]
    if speed := manifest.get("tokens_per_second"):
        yield ["speed", f"{format_count(speed)} tok/s"]
    if memory := manifest.get("peak_memory_bytes"):
        arrays = format_bytes(manifest.get("peak_array_bytes") or 0)
        yield ["memory", f"{format_bytes(memory)}, of which arrays {arrays}"]
    names = [(LATEST, links(store, latest(store))), *((group, links(store, group)) for group in groups(store))]
    if named := [f"{group}/{name}" for group, found in names for name, one in found.items() if one == place]:
        yield ["named", ", ".join(named)]


def _sections(manifest: Manifest) -> Iterator[tuple[str, list[list[str]]]]:
    from mlxchat.store.fingerprint import flatten

    yield "inputs", [[role, str(made.get("artifact"))] for role, made in (manifest.get("inputs") or {}).items()]
    yield "metrics", [[key, format_number(value)] for key, value in manifest["metrics"].items()]
    yield "derived", [[key, show_value(value)] for key, value in flatten(manifest.get("derived") or {}).items()]
    yield "config", [[key, show_value(value)] for key, value in flatten(manifest["config"]).items()]
    yield "from outside", [*_outside(manifest)]
    excluded = manifest.get("excluded") or {}
    about = {"git": manifest.get("git"), "ranks": excluded.get("ranks"), "device": manifest.get("device")}
    made_with = flatten({key: value for key, value in about.items() if value} | (manifest.get("versions") or {}))
    yield "made with", [[key, show_value(value)] for key, value in made_with.items()]
    yield "files", [[file["path"], format_bytes(file["bytes"]), file["sha256"][:12]] for file in manifest["outputs"]]


def _outside(manifest: Manifest) -> Iterator[list[str]]:
    """Yield name, version and the start of the sha256 of each external file or package."""
    for item in manifest.get("externals") or ():
        name, version = item.get("name") or item.get("url"), item.get("revision") or item.get("version")
        yield [str(name), str(version or ""), str(item.get("sha256") or "")[:12]]


def lineage(parser: Parser) -> None:
    parser.take_names("ID")
    parser.add_json()


def _lineage(options: Namespace) -> int:
    """Print the tree of an artifact's inputs and that of its uses."""
    from mlxchat.store.catalog import by_rid, lineage

    store = Store(options.outputs)
    place = resolve(store, options.names[0])
    manifest = read_manifest(place)
    shown = (each for each in read_catalog(store) if each.get("kind") != SHARED_KIND or each["folder"] == place.name)
    known = by_rid(shown)
    inputs, uses = lineage(manifest["rid"], known, "inputs"), lineage(manifest["rid"], known, "uses")
    outside = [*_outside(manifest)]
    if options.json:
        print_json({"inputs": inputs, "outside": outside, "uses": uses})
        return 0
    print(f"made from\n{_draw_lineage(inputs, 'inputs')}")
    if outside:
        print(aligned(outside, indent="  "))
    print(f"used by\n{_draw_lineage(uses, 'uses')}")
    return 0


def _draw_lineage(tree: Node, below: str) -> str:
    """Return a tree in which a repeated artifact's branch is drawn once."""
    seen: set[str] = set()

    def label(node: Node) -> str:
        role = f"{node['role']}: " if node["role"] else ""
        note = "" if node["here"] else "  (no longer in the store)"
        again = "  (see above)" if node["rid"] in seen and node[below] else ""
        return visible(f"{role}{node['artifact']}  [{node['step']}]{note}{again}")

    def children(node: Node) -> list[Node]:
        if node["rid"] in seen:
            return []
        seen.add(node["rid"])
        return list(node[below])

    return indent(draw_tree(tree, label, children), "  ")


def diff(parser: Parser) -> None:
    parser.take_names("A B", least=2, most=2, about="A, B: two artifacts, or two runs")
    parser.add_json()


def _diff(options: Namespace) -> int:
    """Print each difference as key, old → new; of two runs step by step."""
    from mlxchat.store.compare import differences

    names, store = options.names, Store(options.outputs)
    runs = [meant.name for name in names if isinstance(meant := meaning(store, name), Run)]
    if len(runs) == len(names):
        old, new = (links(store, run) for run in runs)
        pairs = {step: (old.get(step), new.get(step)) for step in dict.fromkeys([*old, *new])}
    else:
        pairs = {"": (resolve(store, names[0]), resolve(store, names[1]))}
    records: dict[str, Row] = {}
    for step, (a, b) in pairs.items():
        both = differences(read_manifest(a), read_manifest(b)) if a and b else {}
        records[step] = {"a": a and a.name, "b": b and b.name, **both}
    if options.json:
        print_json(records.get("", records))
        return 0
    for step, record in records.items():
        if step:
            print(visible(f"\n── {step}"))
        _print_difference(**record)
    return 0


def _print_difference(a: str | None, b: str | None, **found: dict[str, tuple[Any, Any]]) -> None:
    if a is None or b is None:
        print(f"only in {'a' if b is None else 'b'}")
        return
    print(visible(f"a  {a}\nb  {b}"))
    for section, changes in found.items():
        if changes:
            rows = [[key, _change(old, new)] for key, (old, new) in changes.items()]
            print(f"{section}\n{aligned(rows, indent='  ')}")
    same = [section for section, changes in found.items() if not changes]
    print(f"equal: {', '.join(same)}" if any(found.values()) else "no difference")


def _change(old: Any, new: Any) -> str:
    """Return old → new, and a float's relative change."""
    told = f"{show_value(old)} → {show_value(new)}"
    is_float = isinstance(old, float) and isinstance(new, float)
    return f"{told}  ({(new - old) / abs(old):+.1%})" if is_float and old else told


def verify(parser: Parser) -> None:
    parser.take_names("[ID…]", least=0, most=None)
    parser.add_json()


def _verify(options: Namespace) -> int:
    """Verify all or the named artifacts; return 1 if something differs."""
    from mlxchat.store.catalog import check_contents, find_absent

    names, store = options.names, Store(options.outputs)
    every = [store.outputs / "store" / name for name in list_folder(store.outputs / "store")]
    named = dict.fromkeys(place for name in names for place in find_all(store, name))
    places = list(named) or [place for place in every if (place / MANIFEST).exists()]
    faults: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for place in places:
        if found := list(check_contents(place)):
            faults[place.name] = found
        elif found := list(find_absent(store, place)):
            absent[place.name] = found
        if found and not options.json:
            print("\n".join(visible(f"{place.name}  {fault}") for fault in found), flush=True)
    size = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
    if options.json:
        print_json({"artifacts": len(places), "bytes": size, "faults": faults, "absent": absent})
        return int(bool(faults or absent))
    if not places:
        print(store.lacking("artifacts"))
        return 0
    hashed = f"{plural(len(places), 'artifact')} hashed ({format_bytes(size)})"
    print(f"{hashed}: {len(faults)} differ, {len(absent)} lack inputs")
    if faults or absent:
        print("remove the folders that differ, and run again what made them and the inputs (mlxchat show ID)")
    return int(bool(faults or absent))
