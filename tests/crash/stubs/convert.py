"""Makes its artifact from one input, as the tokenizer does."""

from mlxchat.runner.stage import Stage
from stubs.source import count_execution

stage = Stage(version=1, inputs={"text": "text"}, produces="table", outputs=["table.txt"], reads=["convert"])


def run(ctx):
    count_execution(ctx)
    lines = (ctx.inputs["text"] / "text.txt").read_text().splitlines()
    (ctx.out / "table.txt").write_text("\n".join(sorted(lines, reverse=True)) + "\n")
