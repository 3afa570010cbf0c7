"""mlxchat ls: the artifacts."""

from __future__ import annotations

from mlxchat.commands.arguments import make_parser, outputs_folder
from mlxchat.runner.progress import format_bytes, format_number, format_seconds
from mlxchat.runner.store import Store


def main(arguments: list[str]) -> int:
    """Print a line per artifact, the newest last."""
    parser = make_parser("ls", "List the artifacts, the newest last.")
    store = Store(outputs_folder(parser.parse_intermixed_args(arguments).settings))
    manifests = sorted(store.manifests(), key=lambda manifest: str(manifest["published"]))
    for manifest in manifests:
        size = format_bytes(sum(file["bytes"] for file in manifest["outputs"]))
        numbers = "  ".join(f"{key} {format_number(value)}" for key, value in list(manifest["metrics"].items())[:3])
        print(
            f"{manifest['published'][:16].replace('T', ' ')}  {manifest['name']:<36} {manifest['step']:<10} "
            f"{size:>9}  {format_seconds(manifest['seconds']):>7}  {numbers}"
        )
    if not manifests:
        print(f"{store.outputs} holds no artifacts yet: run mlxchat first")
    return 0
