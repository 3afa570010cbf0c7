"""mlxchat status: what is done, running and left over in an outputs folder."""

from __future__ import annotations

from mlxchat.commands.arguments import make_parser, outputs_folder
from mlxchat.runner import attempts, locks
from mlxchat.runner.progress import format_bytes, format_seconds
from mlxchat.runner.records import Records
from mlxchat.runner.store import Store, read_manifest


def main(arguments: list[str]) -> int:
    """Print the steps of the latest run and the work in progress."""
    parser = make_parser("status", "Show what is done, running and left over.")
    store = Store(outputs_folder(parser.parse_intermixed_args(arguments).settings))
    refs = store.refs()
    if refs:
        print("done (latest of each step)")
    for step, place in refs.items():
        manifest = read_manifest(place)
        size = format_bytes(sum(file["bytes"] for file in manifest["outputs"]))
        when = manifest["published"][:16].replace("T", " ")
        print(f"  {step:<11} {place.name:<36} {size:>9}  {format_seconds(manifest['seconds']):>7}  {when}")
    work = [folder for folder in sorted((store.outputs / "work").glob("[!.]*")) if folder.is_dir()]
    if work:
        print("in progress or left over")
    for folder in work:
        print(f"  {_describe_work(store, folder.name)}")
    if not refs and not work:
        print(f"{store.outputs} holds nothing yet: run mlxchat first")
    return 0


def _describe_work(store: Store, rid: str) -> str:
    """Return a line about a step's unfinished work: who makes it now, or how the last attempt ended."""
    executions = attempts.read(store.work(rid))
    records = Records(store.work(rid) / "ckpt" / "records" / "metrics.jsonl").read()
    iteration = f" at iteration {records[-1].get('iteration')}" if records else ""
    if locks.is_held(store.lock(rid)):
        owner = locks.read_owner(store.lock(rid))
        name = owner.get("step", rid[:16])
        return f"{name:<11} running in process {owner.get('pid')} on {owner.get('host')}{iteration}"
    if not executions:
        return f"{rid[:16]}  never started"
    last = executions[-1]
    error = f": {last['error']}" if last.get("error") else ""
    return f"{last.get('step', rid[:16]):<11} {last['outcome']}{iteration}{error}"
