"""mlxchat bench: how fast this machine is at one kind of work."""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mlxchat.composition.compose import compose_config, group_options, split_options
from mlxchat.config.secrets import redact
from mlxchat.errors import ConfigError, suggest
from mlxchat.store.records import now
from mlxchat.store.sealed import write_whole

# Kind → (module in mlxchat.bench, its function from configuration to plain data, what it measures).
KINDS = {
    "train": ("train", "measure_training", "training steps, validation's forward pass, memory, share of the peak"),
    "core": ("core", "measure_core", "CORE's examples, against computing them one at a time"),
    "generate": ("generate", "measure_generation", "reading prompts, decoding 1, 8 and 32 rows, what memory allows"),
    "tokenizer": ("tokenizer", "measure_tokenizer", "training of a tokenizer and encoding, against nanochat's ways"),
}

_USAGE = """usage: mlxchat bench KIND [SETTINGS] [--json] [--config-dir DIR]

Measure how fast this machine works, with random weights and text. What was measured is kept
in outputs/bench, if there is an outputs folder, and shown in its reports.

{kinds}

  --json               print one JSON object instead of tables
  bench.KEY=VALUE      vocab_size, batch_rows, row_tokens, steps, warmup_steps, split: conf/settings/bench.yaml
                       tokenizer: chars, vocab_size
                       core: bundle (made-up examples without one), core_tasks, core_examples
  model=d8             nanochat's own sizes, since experiment=bench is the default here
  architecture=NAME    with the optimizer of the same snapshot, unless optimizer= says otherwise
  experiment=NAME      its model, architecture, optimizer, vocabulary and rows: quickstart is what plain mlxchat trains
"""


def main(arguments: list[str]) -> int:
    """Measure and print tables, or with --json one JSON object; progress goes to stderr."""
    if "--help" in arguments or "-h" in arguments:
        kinds = "\n".join(f"  {kind:<20} {purpose}" for kind, (_, _, purpose) in KINDS.items())
        print(_USAGE.format(kinds=kinds), end="")
        return 0
    overrides, config_dirs, primary = split_options([argument for argument in arguments if argument != "--json"])
    kind = overrides.pop(0) if overrides and "=" not in overrides[0] else ""
    if kind not in KINDS:
        problem = f'there is no bench "{kind}"' if kind else "say what to measure"
        raise ConfigError(f"{problem}: {', '.join(KINDS)}.{suggest(kind, KINDS)} See: mlxchat bench --help")

    config = compose_config(_with_defaults(overrides), config_dirs, primary).config
    module, function, _ = KINDS[kind]
    measuring = import_module(f"mlxchat.bench.{module}")
    record: dict[str, Any] = getattr(measuring, function)(config)
    _keep(kind, record, arguments, Path(config.outputs))
    if "--json" in arguments:
        print(json.dumps(record, allow_nan=False))
    else:
        from mlxchat.bench import tables

        getattr(measuring, "print_tables", tables.print_tables)(record, sys.stdout)
    return 0


def _keep(kind: str, record: dict[str, Any], arguments: list[str], outputs: Path) -> None:
    """Keep what was measured for the reports of an outputs folder, if there is one."""
    if not outputs.is_dir():
        return
    time = now()
    kept = {"kind": kind, "time": time, "command": shlex.join(["mlxchat", "bench", *arguments]), "result": record}
    name = re.sub(r"[^0-9T]", "", time.partition("+")[0]).replace("T", "-")
    with suppress(OSError):
        (outputs / "bench").mkdir(exist_ok=True)
        write_whole(outputs / "bench" / f"{name}-{kind}.json", json.dumps(redact(kept)).encode())


def _with_defaults(overrides: list[str]) -> list[str]:
    """Return the overrides with experiment=bench, and with the optimizer that belongs to the architecture."""
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    if "experiment" in given:
        return overrides
    chosen = ["experiment=bench"]
    fitting = f"muon_{given.get('architecture')}"
    if "optimizer" not in given and fitting in group_options("optimizer"):
        chosen.append(f"optimizer={fitting}")
    return [*chosen, *overrides]
