"""mlxchat ls: the artifacts."""

from __future__ import annotations

from mlxchat.commands.arguments import make_parser, outputs_folder
from mlxchat.runner.progress import format_bytes, format_number, format_seconds
from mlxchat.runner.shared import SHARED_KIND
from mlxchat.runner.store import Manifest, Store


def main(arguments: list[str]) -> int:
    """Print a line per artifact, the newest last."""
    parser = make_parser("ls", "List the artifacts, the newest last.")
    store = Store(outputs_folder(parser.parse_intermixed_args(arguments).settings))
    manifests = sorted(store.manifests(), key=lambda manifest: str(manifest["published"]))
    encoded = [manifest for manifest in manifests if manifest["kind"] == SHARED_KIND]
    for manifest in manifests:
        if manifest["kind"] == SHARED_KIND:
            continue
        size = format_bytes(_bytes_of(manifest))
        numbers = "  ".join(f"{key} {format_number(value)}" for key, value in list(manifest["metrics"].items())[:3])
        extended = manifest["inputs"].get("extends")
        lineage = f"  extends {extended['artifact']}" if extended else ""
        print(
            f"{manifest['published'][:16].replace('T', ' ')}  {manifest['name']:<36} {manifest['step']:<10} "
            f"{size:>9}  {format_seconds(manifest['seconds']):>7}  {numbers}{lineage}"
        )
    if encoded:
        size = format_bytes(sum(map(_bytes_of, encoded)))
        print(
            f"and {len(encoded)} folders of encoded text, {SHARED_KIND}-* ({size}), which trainings and evaluations "
            "share, and make again if they are removed"
        )
    if not manifests:
        print(f"{store.outputs} holds no artifacts yet: run mlxchat first")
    return 0


def _bytes_of(manifest: Manifest) -> int:
    return sum(file["bytes"] for file in manifest["outputs"])
