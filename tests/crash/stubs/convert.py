"""Makes its artifact from one input, as the tokenizer does."""

from stubs.source import count_execution

VERSION = 1
CONFIG = ["convert"]
INPUTS = {"text": "text"}
PRODUCES = "table"
OUTPUTS = ["table.txt"]


def run(ctx):
    count_execution(ctx)
    lines = (ctx.inputs["text"] / "text.txt").read_text().splitlines()
    (ctx.out / "table.txt").write_text("\n".join(sorted(lines, reverse=True)) + "\n")
