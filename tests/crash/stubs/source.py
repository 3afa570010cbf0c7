"""Makes its artifact from settings alone, as the corpus does."""

from mlxchat.runner.stage import Stage

stage = Stage(version=1, produces="text", outputs=["text.txt"], reads=["source"])


def run(ctx):
    count_execution(ctx)
    text = "".join(f"line {index}\n" for index in range(ctx.config.source.lines // 10 * 10))
    (ctx.out / "text.txt").write_text(text)
    (ctx.out / "parts").mkdir()
    (ctx.out / "parts" / "0.txt").write_text(text[:20])
    ctx.metrics["lines"] = len(text.splitlines())


def count_execution(ctx):
    """Add a line to <outputs>/../executions.txt; one write, so that racing processes lose none."""
    with (ctx.out.parents[3] / "executions.txt").open("a") as file:
        file.write(f"{ctx.step}\n")
