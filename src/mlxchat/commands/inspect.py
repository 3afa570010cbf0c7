"""Verbs that read an outputs folder: status, ls, show, lineage, diff, verify."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser, positive
from mlxchat.commands.columns import aligned, print_json, show_value, when
from mlxchat.config.wording import format_bytes, format_count, format_number, format_seconds
from mlxchat.errors import ConfigError, MlxchatError, StoreError, suggest, visible
from mlxchat.store.catalog import Summary, read_catalog
from mlxchat.store.files import Records, read_end
from mlxchat.store.manifest import MANIFEST, Manifest, read_manifest
from mlxchat.store.naming import LATEST, Run, find_all, groups, latest, links, meaning, resolve
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.store.catalog import Node

_LOG_LINES = 3

Row = dict[str, Any]


def status(parser: Parser) -> None:
    """Declare `mlxchat status`."""
    parser.take_names("[RUN]", least=0)
    parser.add_json()
    parser.add_argument("--cancel", action="store_true", help="end all jobs in queues and on clusters; they save first")
    parser.set_defaults(main=_status)


def _status(options: Namespace) -> int:
    """Print running steps, failures, and the steps of a run."""
    names, store = options.names, Store(options.outputs)
    run = latest(store)
    if names:
        meant = meaning(store, names[0])
        if not isinstance(meant, Run):
            raise StoreError(f'"{names[0]}" is {meant.place.name}, not a run. See: mlxchat show {names[0]}')
        run = meant.name
    jobs = _describe_jobs(store, cancel=options.cancel)
    in_jobs = {row["record"] for row in jobs}
    work = [_describe_work(store, folder) for folder in _folders(store.outputs / "work")]
    work = [row for row in work if row["state"] == "running" or row["key"] not in in_jobs]
    done = [_describe_done(step, place) for step, place in links(store, run).items()]
    done.sort(key=lambda row: str(row.get("published", "")))
    if options.json:
        found = {"outputs": str(store.outputs), "work": work, "jobs": jobs, "latest": latest(store), "run": run}
        print_json({**found, "done": done})
        return 0
    if jobs:
        print("jobs")
    for row in jobs:
        where = f"run {row['run']}" if row["run"] else f"sweep {Path(row['sweep']).name}"
        print(visible(f"  {row['step']:<11} {row['job']} {row['state']} ({where})"))
    by_title: dict[str, list[Row]] = {"running": [], "failed": [], "left over": []}
    for row in work:
        by_title.get(row["state"], by_title["left over"]).append(row)
    for title, rows in by_title.items():
        if rows:
            print(title)
        for row in rows:
            print(visible("\n".join(_lines_of_work(row))))
    if done:
        print(f"done ({'latest run: ' * (run == latest(store))}{run})")
        print(aligned([_cells_of_step(row) for row in done], right=(2, 3), indent="  "))
    if not done and not work and not jobs:
        print(store.lacking("runs"))
    return 0


def _describe_jobs(store: Store, *, cancel: bool) -> list[Row]:
    """Return the jobs of steps and sweeps in queues and on clusters, after cancelling them if requested."""
    from mlxchat.runner.executors import attach

    found = []
    for path in sorted(store.jobs.glob("*.jsonl")):
        if (job := attach(path)) is None:
            continue
        if cancel:
            job.cancel()
        facts = job.facts
        state = "is cancelled" if cancel else job.describe()
        found.append({
            "job": job.name, "step": facts.get("step", path.stem), "run": facts.get("run"), "sweep": facts.get("sweep"),
            "state": state, "submitted": facts["submitted"], "log": facts.get("log"), "record": path.stem,
        })  # fmt: skip
    return found


def _describe_work(store: Store, folder: Path) -> Row:
    """Return a step's process or the end of its last attempt, and its progress."""
    from mlxchat.store import attempts, locks

    key = folder.name
    executions = attempts.read(folder)
    last = executions[-1] if executions else {}
    held = locks.is_held(store.lock(key))
    owner = locks.read_owner(store.lock(key)) if held else {}
    latest = Records(folder / "ckpt" / "records" / "metrics.jsonl").last()
    run = owner.get("run") or last.get("run")
    state = "running" if held else str(last.get("outcome", "never started"))
    log = store.outputs / "runs" / str(run) / f"{last.get('step')}-error.log"
    return {
        "state": state, "step": owner.get("step") or last.get("step") or key[:16], "key": key, "run": run,
        "pid": owner.get("pid") or last.get("pid"), "host": owner.get("host") or last.get("host"),
        "started": last.get("started"), "ended": last.get("ended"), "attempts": len(executions),
        "iteration": latest.get("iteration"), "loss": latest.get("loss"),
        "tokens_per_second": latest.get("tokens_per_second"), "error": last.get("error"),
        "command": _of_run(store, str(last.get("run")), "plan.json", "command").get("command"),
        "log": str(log) if log.exists() else None, "log_tail": _tail(log) if state == "failed" else [],
    }  # fmt: skip


def _lines_of_work(row: Row) -> list[str]:
    """Return the lines about a running or failed step."""
    at = f" at iteration {row['iteration']}" if row["iteration"] is not None else ""
    speed = f", {format_count(row['tokens_per_second'])} tok/s" if row["tokens_per_second"] else ""
    if row["state"] == "running":
        since = f", since {when(row['started'])}" if row["started"] else ""
        who = f"running in process {row['pid']} on {row['host']} (run {row['run']}){at}{speed}{since}"
        return [f"  {row['step']:<11} {who}"]
    tries = f", attempt {row['attempts']}" if row["attempts"] > 1 else ""
    error = f": {row['error']}" if row["error"] else ""
    lines = [f"  {row['step']:<11} {row['state']}{at}{tries}{error}"]
    lines += [f"              | {line}" for line in row["log_tail"]]
    if row["log"] and row["state"] == "failed":
        lines.append(f"              whole log: {row['log']}")
    return [*lines, f"              continue: {row['command']}"] if row["command"] else lines


def _describe_done(step: str, place: Path) -> Row:
    try:
        manifest = read_manifest(place)
    except StoreError:
        return {"step": step, "artifact": place.name, "damaged": True}
    size = sum(file["bytes"] for file in manifest["outputs"])
    return {
        "step": step, "artifact": place.name, "rid": manifest["rid"], "bytes": size,
        "seconds": manifest["seconds"], "published": manifest["published"],
    }  # fmt: skip


def _cells_of_step(row: Row) -> list[str]:
    if row.get("damaged"):
        return [row["step"], row["artifact"], "-", "-", "damaged: see mlxchat verify"]
    return [
        row["step"], row["artifact"], format_bytes(row["bytes"]), format_seconds(row["seconds"] or 0),
        when(row["published"]),
    ]  # fmt: skip


def _of_run(store: Store, run: str, file: str, *keys: str) -> Row:
    """Return the values of a run's record; empty if it is absent or incomplete."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((store.outputs / "runs" / run / file).read_text(encoding="utf-8"))
        return {key: found[key] for key in keys}
    return {}


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _tail(path: Path) -> list[str]:
    lines = [line.rstrip() for line in read_end(path).decode(errors="replace").splitlines() if line.strip()]
    return lines[-_LOG_LINES:]


_ENCODED = "tokens"


def ls(parser: Parser) -> None:
    """Declare `mlxchat ls`."""
    parser.take_names("[STAGE|STEP|RUN…]", least=0, most=None)
    parser.add_argument("--sort", metavar="METRIC", help="only artifacts with this metric, best first")
    parser.add_json("one JSON array for programs")
    parser.set_defaults(main=_ls)


def _ls(options: Namespace) -> int:
    """Print a line per artifact, newest last."""
    store = Store(options.outputs)
    found = read_catalog(store)
    wanted = options.names
    known = {str(summary.get(key)) for summary in found for key in ("stage", "step") if summary.get(key)}
    of_runs: set[str] = set()
    for name in wanted:
        if name not in known and found:
            of_runs |= _folders_of_run(store, name, known)

    def is_wanted(summary: Summary) -> bool:
        return bool({summary.get("stage"), summary.get("step")} & set(wanted)) or summary["folder"] in of_runs

    shown = [summary for summary in found if not wanted or is_wanted(summary)]
    if options.sort:
        shown = _best_first(shown, options.sort)
    if options.json:
        print_json(shown)
        return 0
    encoded = [summary for summary in shown if summary.get("kind") == _ENCODED]
    listed = shown if _ENCODED in wanted else [summary for summary in shown if summary.get("kind") != _ENCODED]
    if listed:
        print(aligned([_row_of(summary, options.sort) for summary in listed], right=(3, 4)))
    if encoded and listed is not shown:
        size = format_bytes(sum(summary["bytes"] for summary in encoded))
        print(
            f"and {len(encoded)} folders of encoded text, {_ENCODED}-* ({size}), which trainings and evaluations "
            "share, and make again if they are removed"
        )
    if not found:
        print(store.lacking("artifacts"))
    return 0


def _folders_of_run(store: Store, name: str, known: set[str]) -> set[str]:
    """Return the folders of a run's artifacts.

    Raises:
        ConfigError: there is no such run.
    """
    with suppress(StoreError):
        if isinstance(meant := meaning(store, name), Run):
            return {place.name for place in links(store, meant.name).values()}
    raise ConfigError(f'"{name}" is not a stage, step or run: {", ".join(sorted(known))}.{suggest(name, known)}')


def _best_first(summaries: list[Summary], metric: str) -> list[Summary]:
    """Return the artifacts with a metric, best first as their stage declares; names may be STEP.METRIC.

    Raises:
        ConfigError: no artifact has it.
    """
    step, _, name = metric.rpartition(".")
    having = [one for one in summaries if name in (one.get("metrics") or {}) and step in ("", one["step"])]
    if not having:
        known = sorted({key for one in summaries for key in one.get("metrics") or {}})
        raise ConfigError(f'--sort: no artifact has "{metric}": {", ".join(known)}.{suggest(name, known)}')
    from mlxchat.runner.stage import best_of  # slow to import

    is_maximised = best_of(having[0]["stage"], name) is max
    return sorted(having, key=lambda one: float(one["metrics"][name]), reverse=is_maximised)


def _row_of(summary: Summary, metric: str | None = None) -> list[str]:
    if "damaged" in summary:
        return ["damaged         ", summary["folder"], "-", "-", "-", "its manifest cannot be read: see mlxchat verify"]
    shown = list(summary["metrics"].items())[:3]
    if metric:
        name = metric.rpartition(".")[2]
        shown = [(name, summary["metrics"][name])]
    numbers = [f"{key} {format_number(value)}" for key, value in shown]
    extended = summary["inputs"].get("extends")
    if extended:
        numbers.append(f"extends {extended['artifact']}")
    size, seconds = format_bytes(summary["bytes"]), format_seconds(summary["seconds"] or 0)
    return [when(summary["published"]), summary["folder"], str(summary["step"]), size, seconds, "  ".join(numbers)]


EXAMPLES = ("wrong", "right", "all")


def show(parser: Parser) -> None:
    """Declare `mlxchat show`."""
    parser.take_names("ID")
    parser.add_argument(
        "--examples", nargs="?", choices=EXAMPLES, const="all", help="questions and answers of an evaluation or RL"
    )
    parser.add_argument("-n", type=positive, default=5, metavar="N", help="number of examples (default: 5)")
    parser.add_argument("--task", metavar="NAME", help="for an evaluation: only examples of this task")
    parser.add_argument("--iteration", type=int, metavar="N", help="for RL: only answers of this iteration")
    parser.add_argument("--samples", action="store_true", help="what a training wrote on its prompts, also during it")
    parser.add_json("the manifest, unchanged; with --samples a list of them")
    parser.set_defaults(main=_show)


def _show(options: Namespace) -> int:
    """Print an artifact's manifest, the examples of an evaluation or RL, or samples."""
    store = Store(options.outputs)
    if options.samples:
        from mlxchat.commands.examples import show_samples

        return show_samples(store, options.names[0], as_json=options.json)
    place = resolve(store, options.names[0])
    if options.examples is not None:
        from mlxchat.commands.examples import show_examples, show_rollouts  # slow imports
        from mlxchat.evals.examples import has_rollouts

        if has_rollouts(place):
            return show_rollouts(place, which=options.examples, count=options.n, iteration=options.iteration)
        return show_examples(place, which=options.examples, count=options.n, task=options.task)
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
    hosts = sorted({str(attempt.get("host")) for attempt in manifest.get("attempts", ()) if attempt.get("host")})
    attempts = len(manifest.get("attempts", ()))
    made = f"{when(manifest['published'])} in {format_seconds(manifest['seconds'] or 0)}"
    made += f" ({attempts} attempts)" if attempts > 1 else ""
    yield ["made", made + (f" on {', '.join(hosts)}" if hosts else "")]
    yield ["run", str(manifest.get("run"))]
    if manifest.get("overrides"):
        yield ["settings", " ".join(manifest["overrides"])]
    yield ["size", format_bytes(sum(file["bytes"] for file in manifest["outputs"]))]
    yield ["folder", str(place)]
    if manifest.get("tokens_per_second"):
        yield ["speed", f"{format_count(manifest['tokens_per_second'])} tok/s"]
    if manifest.get("peak_memory_bytes"):
        yield ["memory", _memory(manifest)]
    newest = latest(store)
    named = [f"{LATEST}/{name}" for name, one in links(store, newest).items() if one == place]
    named += [f"{group}/{name}" for group in groups(store) for name, one in links(store, group).items() if one == place]
    if named:
        yield ["named", ", ".join(named)]


def _memory(manifest: Manifest) -> str:
    """Return the peak of MLX's arrays, which progress shows and plans predict, and of the whole process."""
    process, arrays = format_bytes(manifest["peak_memory_bytes"]), manifest.get("peak_array_bytes")
    if arrays is None:
        return f"{process} at most, the whole process"
    predicted = (manifest.get("derived") or {}).get("predicted_peak_bytes")
    known = f", {format_bytes(predicted)} predicted" if predicted else ""
    return f"{format_bytes(arrays)} of arrays at most{known}; {process} with the program and its libraries"


def _sections(manifest: Manifest) -> Iterator[tuple[str, list[list[str]]]]:
    from mlxchat.store.fingerprint import flatten

    yield "inputs", [[role, str(made.get("artifact"))] for role, made in (manifest.get("inputs") or {}).items()]
    yield "metrics", [[key, format_number(value)] for key, value in manifest["metrics"].items()]
    yield "derived", [[key, show_value(value)] for key, value in flatten(manifest.get("derived") or {}).items()]
    yield "config", [[key, show_value(value)] for key, value in flatten(manifest["config"]).items()]
    yield "from outside", [*_outside(manifest)]
    git, device = manifest.get("git") or {}, manifest.get("device") or {}
    commit = [["git", f"{str(git.get('commit'))[:12]}{' (changed since)' if git.get('dirty') else ''}"]] if git else []
    if ranks := (manifest.get("excluded") or {}).get("ranks"):
        hosts = ", ".join(dict.fromkeys(ranks.get("hosts", ())))
        commit.append(["ranks", f"{ranks.get('size')} ({ranks.get('backend')}) on {hosts}"])
    versions = [[key, str(value)] for key, value in (manifest.get("versions") or {}).items()]
    yield "made with", [*commit, *([["device", str(device.get("name"))]] if device else []), *versions]
    yield "files", [[file["path"], format_bytes(file["bytes"]), file["sha256"][:12]] for file in manifest["outputs"]]


def _outside(manifest: Manifest) -> Iterator[list[str]]:
    """Yield name, version and the start of the sha256 of each external file or package."""
    for item in manifest.get("externals") or ():
        name, version = item.get("name") or item.get("url"), item.get("revision") or item.get("version")
        yield [str(name), str(version or ""), str(item.get("sha256") or "")[:12]]


def lineage(parser: Parser) -> None:
    """Declare `mlxchat lineage`."""
    parser.take_names("ID")
    parser.add_json()
    parser.set_defaults(main=_lineage)


def _lineage(options: Namespace) -> int:
    """Print the tree of its inputs and that of its uses."""
    from mlxchat.store.catalog import by_rid, lineage

    store = Store(options.outputs)
    place = resolve(store, options.names[0])
    manifest = read_manifest(place)
    shown = (each for each in read_catalog(store) if each.get("kind") != _ENCODED or each["folder"] == place.name)
    known = by_rid(shown)
    inputs, uses = lineage(manifest["rid"], known, "inputs"), lineage(manifest["rid"], known, "uses")
    outside = [*_outside(manifest)]
    if options.json:
        print_json({"inputs": inputs, "outside": outside, "uses": uses})
        return 0
    what = "" if inputs["inputs"] else " outside data" if outside else f" nothing: {visible(inputs['artifact'])}"
    print(f"made from{what}")
    if inputs["inputs"]:
        _print_tree(inputs, "inputs")
    elif outside:
        print(aligned(outside, indent="  "))
    print("used by" if uses["uses"] else f"used by nothing: {visible(uses['artifact'])}")
    if uses["uses"]:
        _print_tree(uses, "uses")
    return 0


def _print_tree(tree: Node, below: str) -> None:
    """Print a tree; a repeated artifact's branch is drawn once."""
    seen: set[str] = set()

    def draw(node: Node, before: str, branch: str, further: str) -> None:
        again = node["rid"] in seen and node[below]
        seen.add(node["rid"])
        role = f"{node['role']}: " if node["role"] else ""
        step = f"  [{node['step']}]" if node["step"] else ""
        note = "" if node["here"] else "  (no longer in the store)"
        print(visible(f"  {before}{branch}{role}{node['artifact']}{step}{note}{'  (see above)' if again else ''}"))
        for child in [] if again else node[below]:
            last = child is node[below][-1]
            draw(child, before + further, "└─ " if last else "├─ ", "   " if last else "│  ")

    draw(tree, "", "", "")


def diff(parser: Parser) -> None:
    """Declare `mlxchat diff`."""
    parser.take_names("A B", least=2, most=2, about="A, B: two artifacts, or two runs")
    parser.add_json()
    parser.set_defaults(main=_diff)


def _diff(options: Namespace) -> int:
    """Print each difference as key, old → new."""
    names, store = options.names, Store(options.outputs)
    runs = [meant.name for name in names if isinstance(meant := meaning(store, name), Run)]
    pairs: dict[str, tuple[Path | None, ...]]
    if len(runs) == len(names):
        old, new = (links(store, run) for run in runs)
        pairs = {step: (old.get(step), new.get(step)) for step in dict.fromkeys([*old, *new])}
    else:
        pairs = {"": tuple(resolve(store, name) for name in names)}
    if options.json:
        records = {step: _describe_pair(*pair) for step, pair in pairs.items()}
        print_json(records.get("", records))
        return 0
    for step, (a, b) in pairs.items():
        if step:
            print(visible(f"\n── {step}"))
        _show_pair(a, b)
    return 0


def _describe_pair(a: Path | None, b: Path | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"a": a and a.name, "b": b and b.name}
    from mlxchat.store.compare import differences

    return {"a": a.name, "b": b.name, **differences(read_manifest(a), read_manifest(b))}


def _show_pair(a: Path | None, b: Path | None) -> None:
    """Print how two artifacts differ."""
    if a is None or b is None:
        print(f"only in {'a' if b is None else 'b'}")
        return
    if a == b:
        print(visible(f"a and b  {a.name}\nno difference"))
        return
    print(visible(f"a  {a.name}\nb  {b.name}"))
    from mlxchat.store.compare import differences

    found = differences(read_manifest(a), read_manifest(b))
    for section, changes in found.items():
        if changes:
            rows = [[key, _change(old, new)] for key, (old, new) in changes.items()]
            print(f"{section}\n{aligned(rows, indent='  ')}")
    same = [section for section, changes in found.items() if not changes]
    print(f"equal: {', '.join(same)}" if any(found.values()) else "no difference")


def _change(old: Any, new: Any) -> str:
    """Return old → new, with six digits unless both would look equal, and a float's relative change."""
    short = [f"{value:.6g}" if isinstance(value, float) else show_value(value) for value in (old, new)]
    told = " → ".join(short if short[0] != short[1] else [show_value(old), show_value(new)])
    is_float = isinstance(old, float) and isinstance(new, float)
    return f"{told}  ({(new - old) / abs(old):+.1%})" if is_float and old else told


def verify(parser: Parser) -> None:
    """Declare `mlxchat verify`."""
    parser.take_names("[ID…]", least=0, most=None)
    parser.add_json()
    parser.set_defaults(main=_verify)


def _verify(options: Namespace) -> int:
    """Verify all or the named artifacts; return 1 if something differs."""
    from mlxchat.store.verify import check_contents, find_absent, makers, remedy

    names, store = options.names, Store(options.outputs)
    base = store.outputs / "store"
    every = sorted(base.iterdir()) if base.is_dir() else []
    named = dict.fromkeys(place for name in names for place in find_all(store, name))
    places = list(named) or [place for place in every if (place / MANIFEST).exists()]
    faults: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for place in places:
        if found := list(check_contents(place)):
            faults[place.name] = found
        elif found := list(find_absent(store, place)) or _faults_below(place):
            absent[place.name] = found
        if found and not options.json:
            print("\n".join(visible(f"{place.name}  {fault}") for fault in found), flush=True)
    size = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
    if options.json:
        print_json({"artifacts": len(places), "bytes": size, "faults": faults, "absent": absent})
    elif not places:
        print(store.lacking("artifacts"))
    else:
        count = "1 artifact is" if len(places) == 1 else f"{len(places)} artifacts are"
        told = f"{len(faults)} of {len(places)} artifacts differ" if faults else f"{count} right"
        print(f"{told} ({format_bytes(size)} hashed)")
        if faults:
            print(visible(remedy(_manifests(store, faults))))
        if absent:
            print(
                f"{len(absent)} of {len(places)} artifacts are intact but lack inputs: keep them "
                f"and run again: {visible(makers(_manifests(store, absent)))}"
            )
    return int(bool(faults or absent))


def _manifests(store: Store, names: Iterable[str]) -> list[Manifest]:
    """Return the manifests of readable artifacts."""
    found = []
    for name in names:
        with suppress(StoreError):
            found.append(read_manifest(store.outputs / "store" / name))
    return found


def _faults_below(place: Path) -> list[str]:
    """Return why intact adapters cannot be used: a problem of their base model."""
    from mlxchat.store.bases import find_chain, is_adapter

    if not is_adapter(place):
        return []
    try:
        find_chain(place)
    except MlxchatError as error:
        return [str(error)]
    return []
