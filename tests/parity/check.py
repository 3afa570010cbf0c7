"""Compare mlxchat with values that nanochat's own code computed: python tests/parity/check.py FILE...

The first word of a file's name gives its format. Each quantity prints one line: its error, the tolerance, and ok or
FAIL. The exit code is 0 if all quantities agree, 1 if some do not, and 2 if a file cannot be read.
"""

import mlxchat  # isort: split

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # isort: split  # for `kit`

from collections.abc import Iterator

import compare_bpb
import compare_chat
import compare_core
import compare_engine
import compare_model
import compare_packing
import compare_rl
import compare_schedules
import compare_tasks
import compare_text
import mlx.core as mx
from comparison import Comparison, Quantity, UnreadableError
from parity_file import ParityFile

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "nanochat": compare_model.QUANTITIES,
    "tokenizer": compare_text.TOKENIZER,
    "conversation": compare_text.CONVERSATION,
    "packing": compare_packing.QUANTITIES,
    "schedules": compare_schedules.QUANTITIES,
    "bpb": compare_bpb.QUANTITIES,
    "rl": compare_rl.QUANTITIES,
    "core": compare_core.QUANTITIES + compare_chat.CORE,
    "engine": compare_engine.QUANTITIES,
    "tasks": compare_tasks.QUANTITIES + compare_chat.TASKS,
}
"""The quantities to compare, by the first word of a file's name."""

SUFFIXES = (".json", ".safetensors")


def open_file(path: Path) -> ParityFile:
    """Return the file at a path.

    Raises:
        UnreadableError: it is missing, or its format is unknown.
    """
    if not path.is_file():
        raise UnreadableError(f"{path}: no such file")
    file = ParityFile(path)
    if file.kind not in QUANTITIES or path.suffix not in SUFFIXES:
        names = ", ".join(f"{kind}_*" for kind in QUANTITIES)
        raise UnreadableError(
            f"{path}: unknown format; expected a name like {names}, ending in {' or '.join(SUFFIXES)}"
        )
    return file


def compare(file: ParityFile, quantity: Quantity) -> Iterator[Comparison]:
    """Yield the lines of a quantity. An exception, also of a value that the file lacks, becomes a failed line.

    Raises:
        UnreadableError: the file, or one that it needs, cannot be read.
    """
    try:
        yield from quantity(file)
    except UnreadableError:
        raise
    except Exception as error:
        yield Comparison(quantity.__name__, float("inf"), 0, f"{type(error).__name__}: {error}".splitlines()[0])


def show(line: Comparison) -> str:
    verdict = "ok" if line.ok else "FAIL"
    return f"  {line.name:<48} {line.error:>10.3g}  ≤ {line.tolerance:<8.3g} {verdict:<4}  {line.detail}".rstrip()


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    mx.set_default_device(mx.cpu)  # the tolerances are those of float32
    count = failed = unreadable = 0
    for argument in arguments:
        before = count
        try:
            file = open_file(Path(argument))
            print(f"{argument}", flush=True)
            for quantity in QUANTITIES[file.kind]:
                for line in compare(file, quantity):
                    print(show(line), flush=True)
                    count, failed = count + 1, failed + (not line.ok)
            if count == before:
                raise UnreadableError(f"{argument}: holds nothing of the format {file.kind}_*")
        except UnreadableError as error:
            print(f"error: {error}", file=sys.stderr)
            unreadable += 1
    print(f"{count - failed} of {count} quantities agree", end="")
    print(f"; {unreadable} of {len(arguments)} files cannot be read" if unreadable else "")
    return 2 if unreadable else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
