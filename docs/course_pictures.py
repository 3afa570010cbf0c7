"""The pictures of the course: `make course-pictures` runs the course's trainings in a folder and draws what they made.

The same trainings give the same files. Finished steps are not computed again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import comb, log
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from mlxchat.composition.compose import compose_config
from mlxchat.data.packing import IGNORED, RowStream, ShuffledConversations
from mlxchat.data.tokenizer import Tokenizer, render_conversation
from mlxchat.data.tokens import Mixture, Tokens
from mlxchat.model import gpt
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.optim.muon import orthogonalise
from mlxchat.report.collect import RunReport, StepReport, collect
from mlxchat.report.document import standalone
from mlxchat.report.plots import COLOURS, INK, LABEL_LETTERS, LINE, SOFT, Picture, bpb_baselines, one_line

COURSE = Path(__file__).parent / "course"
TRAININGS = (
    "experiment=smoke name=course pretrain.num_iterations=200 pretrain.eval_every=20 midtrain.num_iterations=100 "
    "sft.num_iterations=60 rl.num_iterations=20 rl.questions_per_iteration=4 rl.max_new_tokens=32 "
    "rl.schedule.init_lr_frac=1 rl.rewards={brief:{kind:function,function:'rewards:brevity'}}",
    "experiment=smoke name=words stage=tokenizer tokenizer.vocab_size=2048",
    "-m experiment=smoke name=seeds stage=pretrain pretrain.num_iterations=60 seed=1,2,3 "
    "architecture.value_embeddings=false,true",
)
"""Those of chapters 3 to 10, 2 and 12. The reward is in chapter 9."""
WIDE = 648.0
"""Width of a picture without axes, in pixels."""
BLUE, ORANGE, GREEN, PINK, BROWN, VIOLET = COLOURS
GREY = SOFT


def main() -> None:
    """Follow the course in one folder and draw its pictures into another."""
    folder, pictures = map(Path, sys.argv[1:])
    follow(folder)
    pictures.mkdir(parents=True, exist_ok=True)
    for picture in draw(Course(folder)):
        (pictures / f"{picture.name}.svg").write_text(standalone(picture), encoding="utf-8")


def follow(folder: Path) -> None:
    """Run the trainings in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (page,) = COURSE.glob("09_*.md")
    (rewards,) = re.findall(r"^```python\n(# rewards\.py\n.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    (folder / "rewards.py").write_text(rewards, encoding="utf-8")
    for training in TRAININGS:
        subprocess.run([Path(sys.executable).with_name("mlxchat"), *training.split()], cwd=folder, check=True)


def draw(course: Course) -> Iterator[Picture]:
    """Yield the pictures, chapter by chapter."""
    chapters = (
        pipeline, tokens, attention, losses, optimizer, pretraining,
        mixture, mask, rewards, evaluation, sampling, seeds,
    )  # fmt: skip
    yield from (chapter(course) for chapter in chapters)


@dataclass(frozen=True)
class Course:
    """What the trainings left in a folder."""

    folder: Path

    @cached_property
    def run(self) -> RunReport:
        """The whole pipeline."""
        return self._last("course")

    @cached_property
    def tokenizers(self) -> list[Tokenizer]:
        """The course's tokenizer, and the one with more tokens."""
        return [Tokenizer.load(folder_of(run, "tokenizer")) for run in (self.run, self._last("words"))]

    @cached_property
    def base(self) -> tuple[gpt.GPT, Tokenizer]:
        """The base model and its tokenizer."""
        return load_checkpoint(folder_of(self.run, "pretrain"))[:2]

    @cached_property
    def config(self) -> Any:
        """The settings of the pipeline, for mixtures and packing."""
        return compose_config(["experiment=smoke"]).config

    @cached_property
    def seeds(self) -> list[dict[str, Any]]:
        """The jobs of the sweep over seeds."""
        newest = max((self.folder / "outputs/multirun").glob("*-seeds-sweep"))
        table = json.loads((newest / "table.json").read_text(encoding="utf-8"))
        return list(table["rows"] if isinstance(table, dict) else table)

    def _last(self, name: str) -> RunReport:
        outputs = self.folder / "outputs"
        return collect(outputs, max(outputs.glob(f"runs/*-{name}")))


def step_of(run: RunReport, name: str) -> StepReport:
    """Return a step that the run has."""
    step = run.step(name)
    assert step is not None, f"the run has no step {name}"
    return step


def folder_of(run: RunReport, name: str) -> Path:
    """Return the folder of a finished step's artifact."""
    folder = step_of(run, name).folder
    assert folder is not None, f"step {name} is not finished"
    return folder


# Drawing


def canvas(height: float) -> tuple[Figure, Axes]:
    """Return a figure without axes in pixels, from the upper left corner."""
    figure = Figure(figsize=(WIDE / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDE), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def framed(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side and room around them."""
    figure = Figure(figsize=(9.0, height), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.11, wspace=0.08)
    grid = figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.08})
    for panel in grid[0]:
        panel.tick_params(labelsize=9)
        panel.grid(visible=True, axis="both")
    return figure, list(grid[0])


def name_axes(panel: Axes, title: str, x: str, y: str) -> None:
    """Set a panel's title and axis labels."""
    letters = max(LABEL_LETTERS, 90 // len(panel.figure.axes))
    panel.set_title(one_line(title, letters), loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel(one_line(x), fontsize=9.5)
    panel.set_ylabel(one_line(y), fontsize=9.5)


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, strength: float = 0.25) -> None:
    """Fill a rectangle; strength 0 draws its border alone."""
    fill: dict[str, Any] = {"facecolor": colour, "alpha": strength, "linewidth": 0}
    border: dict[str, Any] = {"facecolor": "none", "edgecolor": LINE, "linewidth": 0.8}
    axes.add_patch(Rectangle((x, y), width, height, **(fill if strength else border)))


def label(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write a line of text with its middle at y."""
    axes.text(x, y, text, va="center", **{"fontsize": 11, "color": SOFT, **style})


def shown(text: str) -> str:
    """Return a token as it can be read: blanks as ␣, broken characters as bytes."""
    return text.replace(" ", "␣").replace("\n", "↵")


# Chapters


def pipeline(course: Course) -> Picture:
    """Chapter 1: the steps of the run, and what each of them read."""
    run = course.run
    told = {
        "corpus": f"{step_of(run, 'corpus').fact('train_documents'):,.0f} documents",
        "tokenizer": f"{course.tokenizers[0].vocab_size} tokens",
        "pretrain": f"{step_of(run, 'pretrain').fact('num_iterations'):.0f} iterations",
        "midtrain": f"{step_of(run, 'midtrain').fact('num_iterations'):.0f} iterations",
        "sft": f"{step_of(run, 'sft').fact('num_iterations'):.0f} iterations",
        "rl": f"{step_of(run, 'rl').fact('num_iterations'):.0f} iterations",
    }
    made = {"corpus": "text", "tokenizer": "vocabulary", "pretrain": "base model", "midtrain": "chat format",
            "sft": "answers", "rl": "rewarded"}  # fmt: skip
    places = {name: (14 + 106 * place, 40.0) for place, name in enumerate(told)}
    checkpoints = {step.inputs["checkpoint"]: step.name for step in run.evals}
    places |= {name: (places[checkpoint][0], 150.0) for checkpoint, name in checkpoints.items()}

    def drawing() -> Figure:
        figure, axes = canvas(216)
        for name, (x, y) in places.items():
            is_scores = name in checkpoints.values()
            box(axes, x, y, 90, 50, GREEN if is_scores else BLUE, 0.18)
            label(axes, x + 45, y + 17, name, ha="center", color=INK, fontweight="bold")
            words = (
                (f"{len(scores.tasks)} tasks" if scores.tasks else "text alone")
                if (scores := step_of(run, name).scores)
                else told.get(name, "")
            )
            label(axes, x + 45, y + 35, words, ha="center", fontsize=9.5)
            if not is_scores:
                label(axes, x + 45, y + 62, made[name], ha="center", fontsize=9.5)
            for source in step_of(run, name).inputs.values():
                left, top = places[source]
                if source in checkpoints and is_scores:
                    ends, bend = ((left + 12, top + 50), (x + 12, y)), 0.0
                elif is_scores:
                    ends, bend = ((left + 45, top + 70), (x, y + 25)), 0.2
                else:
                    is_next = x - left < 110
                    ends = ((left + 90, top + 25), (x, y + 25)) if is_next else ((left + 45, top), (x + 45, y))
                    bend = 0.0 if is_next else -0.14
                style: Any = {"arrowstyle": "-|>", "mutation_scale": 9, "color": SOFT, "linewidth": 1.1}
                axes.add_patch(FancyArrowPatch(*ends, connectionstyle=f"arc3,rad={bend}", **style))
        return figure

    edges = "; ".join(f"{step.name} reads {', '.join(step.inputs.values())}" for step in run.steps if step.inputs)
    return Picture(name="pipeline", alt=f"The steps of the pipeline. {edges}.", draw=drawing)


def tokens(course: Course) -> Picture:
    """Chapter 2: one text as bytes and as the tokens of two vocabularies."""
    text = "The capital of France. Zürich 2026"
    cut = []
    for tokenizer in course.tokenizers:
        ids = tokenizer.encode(text)
        cut.append((f"{tokenizer.vocab_size:,}", ids, [tokenizer.decode_bytes([id_]) for id_ in ids]))
    size = len(text.encode())
    colours = (BLUE, ORANGE, GREEN, PINK)
    cell = (WIDE - 28) / size

    def drawing() -> Figure:
        figure, axes = canvas(212)
        label(axes, 14, 18, f"{size} bytes", color=INK)
        broken = {place for place, byte in enumerate(text.encode()) if byte > 127}
        letters = [f"{byte:02x}" if place in broken else chr(byte) for place, byte in enumerate(text.encode())]
        for place, letter in enumerate(letters):
            box(axes, 14 + cell * place, 28, cell - 1.5, 22, GREY, 0.25)
            label(axes, 14 + cell * (place + 0.5) - 0.75, 39.5, shown(letter), ha="center", color=INK, fontsize=10)
        for row, (name, ids, pieces) in enumerate(cut):
            top = 72 + 72 * row
            label(axes, 14, top, f"{len(ids)} tokens of a vocabulary of {name}", color=INK)
            x = 14.0
            for place, (id_, piece) in enumerate(zip(ids, pieces, strict=True)):
                width = cell * len(piece)
                box(axes, x, top + 10, width - 1.5, 22, colours[place % 4], 0.28)
                is_text = all(byte < 128 for byte in piece) or len(piece.decode(errors="ignore").encode()) == len(piece)
                letter = shown(piece.decode()) if is_text else piece.hex(" ")
                style: Any = {"ha": "center", "color": INK, "fontsize": 10}
                label(axes, x + width / 2 - 0.75, top + 21.5, letter, **style)
                label(axes, x + width / 2 - 0.75, top + 41, str(id_), ha="center", fontsize=7.5)
                x += width
        return figure

    said = "; ".join(f"{len(ids)} tokens of a vocabulary of {name}" for name, ids, _ in cut)
    return Picture(name="tokens", alt=f"“{text}” has {size} bytes. {said}.", draw=drawing)


def attention(course: Course) -> Picture:
    """Chapter 3: the weights with which each token reads from earlier ones, and a sliding window."""
    model, tokenizer = course.base
    ids = [tokenizer.bos, *tokenizer.encode("The capital of France")]
    weights: list[np.ndarray[Any, Any]] = []
    attend = gpt.attention

    def record(q: mx.array, k: mx.array, v: mx.array, mask: Any, scale: float) -> mx.array:
        scores = (q @ k.swapaxes(2, 3)) * scale
        visible = mx.array(np.tril(np.ones(scores.shape[2:], dtype=np.bool_)))
        weights.append(np.array(mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1).mean(axis=(0, 1))))
        return attend(q, k, v, mask, scale)

    with patch.object(gpt, "attention", record):
        mx.eval(model(mx.array([ids])))
    words = ["bos", *(shown(tokenizer.decode([id_])) for id_ in ids[1:])]
    window = 4
    titles = [
        *(f"layer {layer}: mean of the heads" for layer in range(len(weights))),
        f"a window of {window}, for comparison",
    ]
    places = np.arange(len(ids))
    seen = (places <= places[:, None]) & (places >= places[:, None] - window)
    matrices = [*weights, seen / seen.sum(axis=1, keepdims=True)]

    def drawing() -> Figure:
        figure, panels = framed(len(matrices), height=3.5)
        for panel, title, matrix in zip(panels, titles, matrices, strict=True):
            rows, columns = np.nonzero(matrix > 0.004)
            colour = GREEN if matrix is matrices[-1] else BLUE
            panel.scatter(columns, rows, s=115 * matrix[rows, columns], color=colour, marker="s", linewidths=0)
            panel.set(xlim=(-0.6, len(ids) - 0.4), ylim=(len(ids) - 0.4, -0.6), aspect="equal")
            panel.set_xticks(range(len(ids)), words, rotation=90)
            panel.set_yticks(range(len(ids)), words if panel is panels[0] else [])
            panel.grid(visible=False)
            name_axes(panel, title, "is read", "reads" if panel is panels[0] else "")
        return figure

    first = weights[0][-1]
    alt = (
        f"Attention weights of the base model on “The capital of France”, as squares, in {len(weights)} layers: no "
        f"token reads a later one. In layer 0 the last token gives {100 * first[-1]:.0f}% of its weight to itself. "
        f"Beside it a sliding window, in which a token sees itself and the {window} before it."
    )
    return Picture(name="attention", alt=alt, draw=drawing)


def losses(course: Course) -> Picture:
    """Chapter 4: the loss of each token of a sentence."""
    model, tokenizer = course.base
    ids = [tokenizer.bos, *tokenizer.encode("The population of France is 68 million.")]
    logits = model(mx.array([ids[:-1]]))[0]
    nats = np.array(mx.logsumexp(logits, axis=-1) - logits[mx.arange(len(ids) - 1), mx.array(ids[1:])])
    words = [shown(tokenizer.decode([id_])) for id_ in ids[1:]]
    guess = log(tokenizer.vocab_size)

    def drawing() -> Figure:
        figure, (panel,) = framed(1, height=2.9)
        panel.bar(range(len(words)), nats, color=[ORANGE if loss > nats.mean() else BLUE for loss in nats], width=0.8)
        panel.set_xticks(range(len(words)), words)
        panel.grid(visible=False, axis="x")
        for value, name in ((guess, "guessing"), (float(nats.mean()), "mean")):
            panel.axhline(value, color=SOFT, linewidth=1.1, linestyle=(0, (4, 3)))
            panel.text(len(words) - 0.4, value, f"{name}\n{value:.2f}", va="center", color=SOFT, fontsize=9)
        panel.set_xlim(-0.6, len(words) + 1.4)
        name_axes(panel, "Loss of each token", "", "nats")
        return figure

    worst = int(nats.argmax())
    alt = (
        f"Bars of the loss of each token of “The population of France is 68 million.”: {nats.mean():.2f} nats on "
        f"average, most for “{words[worst]}” with {nats[worst]:.2f}; {guess:.2f} if all tokens were equally likely."
    )
    return Picture(name="loss", alt=alt, draw=drawing)


def optimizer(course: Course) -> Picture:
    """Chapter 5: the learning rate of each stage, and what Muon does to the singular values of a gradient."""
    stages = ("pretrain", "midtrain", "sft")
    rates = {name: step_of(course.run, name).series("lr_multiplier") for name in stages}
    gradient = mx.random.normal((1, 64, 64), key=mx.random.key(0)) * mx.exp(-mx.arange(64) / 8)
    matrices = {"gradient": gradient, "Muon's step": orthogonalise(gradient, 5, mx.float32)}
    values = {name: np.linalg.svd(np.array(matrix[0]), compute_uv=False) for name, matrix in matrices.items()}

    def drawing() -> Figure:
        figure, (left, right) = framed(2, height=2.9)
        for (name, (xs, ys)), colour in zip(rates.items(), COLOURS, strict=False):
            left.plot([100 * x / xs[-1] for x in xs], ys, color=colour, label=name)
        left.set_ylim(bottom=0)
        left.legend(fontsize=9.5)
        name_axes(left, "Learning rate", "% of the stage's iterations", "× the peak rate")
        for (name, ys), colour in zip(values.items(), (ORANGE, BLUE), strict=True):
            right.plot(range(1, 65), ys, color=colour, label=name)
        right.set(yscale="log", ylim=(2e-5, 20))
        right.set_yticks([0.0001, 0.01, 1], ["0.0001", "0.01", "1"])
        right.minorticks_off()
        right.legend(fontsize=9.5)
        name_axes(right, "A gradient before and after Muon", "direction, strongest first", "singular value")
        return figure

    ends = ", ".join(f"{name} from {ys[0]:g} to {ys[-1]:.2g}" for name, (_, ys) in rates.items())
    alt = f"Left, the learning rate of each stage: {ends}. Right, singular values: those of the gradient fall from "
    alt += f"{values['gradient'][0]:.1f} steeply, most of Muon's step are about 1."
    return Picture(name="optimizer", alt=alt, draw=drawing)


def pretraining(course: Course) -> Picture:
    """Chapter 6: training loss, and bits per byte beside simple rivals."""
    step = step_of(course.run, "pretrain")
    (loss_xs, loss_ys), (xs, ys) = step.series("loss"), step.series("val_bpb")
    rivals = bpb_baselines(course.run, step)

    def drawing() -> Figure:
        figure, (left, right) = framed(2, height=2.9)
        left.plot(loss_xs, loss_ys, color=BLUE, linewidth=1.2)
        name_axes(left, "Loss of the rows just trained on", "iteration", "nats per token")
        right.plot(xs, ys, color=BLUE, marker="o", markersize=3.5)
        for name, value in rivals.items():
            right.axhline(value, color=SOFT, linewidth=1.1, linestyle=(0, (4, 3)))
            right.text(loss_xs[-1], value, f"{name} {value:.2f}", ha="right", va="bottom", color=SOFT, fontsize=9)
        right.annotate(f"{ys[-1]:.2f}", (xs[-1], ys[-1]), (0, -12), textcoords="offset points", ha="center",
                       color=BLUE, fontsize=9.5)  # fmt: skip
        right.margins(y=0.12)
        name_axes(right, "Held-out text", "iteration", "bits per byte")
        return figure

    told = ", ".join(f"{name} {value:.2f}" for name, value in rivals.items())
    alt = (
        f"Left, the training loss falls from {loss_ys[0]:.2f} to {loss_ys[-1]:.2f} nats per token in {len(loss_xs)} "
        f"iterations. Right, held-out text ends at {ys[-1]:.2f} bits per byte; for comparison {told}."
    )
    return Picture(name="pretraining", alt=alt, draw=drawing)


def encode(tokenizer: Tokenizer, mixture: Mixture, count: int) -> Tokens:
    """Return the first conversations of a mixture as tokens with loss masks."""
    rendered = [render_conversation(tokenizer, mixture[place], max_tokens=None) for place in range(count)]
    return Tokens.of(rendered, tokenizer.vocab_size)


def packed(course: Course, stage: str, mixture: Mixture, rows: int) -> Iterator[list[tuple[str, int, bool]]]:
    """Yield rows of a stage as runs of (task, tokens, whether they are targets); padding has no task."""
    tokenizer, config = course.tokenizers[0], getattr(course.config, stage)
    conversations = encode(tokenizer, mixture, 300)
    stream = RowStream(
        config.packing, ShuffledConversations(conversations, None), row_tokens=config.batch.row_tokens,
        buffer_size=100, batch_rows=rows, padding=tokenizer.bos,
        train_on=config.train_on,
    )  # fmt: skip
    for _ in range(rows):
        _, targets = stream.next_row()
        runs, begin = [], 0
        for address in stream.placed:
            end = begin + len(conversations.ids(address))
            # Position t of the targets is token t + 1 of the row.
            for is_target, each in groupby(targets[max(0, begin - 1) : end - 1], lambda target: target != IGNORED):
                runs.append((mixture.task_of(address), len(list(each)), is_target))
            runs.append(("", 0, False))
            begin = end
        yield runs


def mixture(course: Course) -> Picture:
    """Chapter 7: shares of the tasks, and rows of several conversations."""
    items, tokenizer = course.config.midtrain.mixture, course.tokenizers[0]
    mixed = Mixture(items, seed=1)
    counts = mixed.counts()
    means = {
        name: np.mean(
            [
                len(render_conversation(tokenizer, task[place], max_tokens=None)[0])
                for place in range(min(100, len(task)))
            ]
        )
        for name, task in mixed.tasks().items()
    }
    sums = {name: counts[name] * float(means[name]) for name in counts}
    shares = {name: (counts[name] / sum(counts.values()), sums[name] / sum(sums.values())) for name in counts}
    order = sorted(shares, key=lambda name: -shares[name][1])
    palette = dict(zip(order, (BLUE, ORANGE, GREEN, PINK, BROWN, VIOLET), strict=False))
    rows = list(packed(course, "midtrain", mixed, 7))

    def drawing() -> Figure:
        figure, axes = canvas(226)
        label(axes, 14, 18, "Share of the mixture", color=INK, fontweight="bold")
        label(axes, 280, 18, "Rows of 256 tokens, one colour per task", color=INK, fontweight="bold")
        for place, name in enumerate(order):
            y, colour = 38 + 20 * place, palette.get(name, GREY)
            label(axes, 84, y + 6, name, ha="right", fontsize=10)
            for part, (top, strength) in enumerate(((y, 0.35), (y + 7, 0.9))):
                width = 130 * shares[name][part] / max(max(share) for share in shares.values())
                box(axes, 90, top, width, 6, colour, strength)
            label(axes, 94 + width, y + 9, f"{100 * shares[name][1]:.0f}%", fontsize=9)
        label(axes, 14, 38 + 20 * len(order) + 8, "pale: of conversations, full: of tokens", fontsize=9.5)
        for place, row in enumerate(rows):
            _draw_row(axes, 280, 36 + 22 * place, row, lambda task, _: (palette.get(task, GREY), 0.8))
        label(axes, 280, 36 + 22 * len(rows) + 10, "empty: padding, no loss", fontsize=9.5)
        return figure

    told = ", ".join(f"{name} {100 * shares[name][1]:.0f}%" for name in order)
    alt = f"Shares of the midtraining mixture's tokens: {told}. Beside it seven rows of 256 tokens, each filled with "
    alt += f"{min(map(_conversations, rows))} to {max(map(_conversations, rows))} conversations of several tasks."
    return Picture(name="mixture", alt=alt, draw=drawing)


def _conversations(row: list[tuple[str, int, bool]]) -> int:
    return sum(not task for task, _, _ in row)


def _draw_row(axes: Axes, x: float, y: float, row: list[tuple[str, int, bool]], style: Any) -> None:
    """Draw one packed row, 1.37 pixels per token, with a gap between conversations."""
    box(axes, x, y, 1.37 * 256, 15, GREY, 0.0)
    for task, count, is_target in row:
        if not task:
            axes.plot([x, x], [y, y + 15], color=INK, linewidth=0.9)
            continue
        colour, strength = style(task, is_target)
        box(axes, x, y, 1.37 * count, 15, colour, strength)
        x += 1.37 * count


def mask(course: Course) -> Picture:
    """Chapter 8: the tokens of a conversation that are trained on, and rows of them."""
    tokenizer = course.tokenizers[0]
    mixed = Mixture(course.config.sft.mixture, seed=1)
    place = next(place for place in range(len(mixed)) if mixed.task_of(place) == "arithmetic")
    ids, trained = render_conversation(tokenizer, mixed[place])
    names = {id_: name for name, id_ in tokenizer.special_ids.items()}
    pieces = [
        (names[id_] if id_ in names else tokenizer.decode([id_]), bool(on))
        for id_, on in zip(ids, trained, strict=True)
    ]
    cell, widest = 6.6, WIDE - 28
    lines: list[list[tuple[str, bool, float]]] = [[]]
    for text, on in pieces:
        width = cell * len(text) + 7
        if sum(each[2] for each in lines[-1]) + width > widest:
            lines.append([])
        lines[-1].append((shown(text), on, width))
    rows = list(packed(course, "sft", mixed, 5))
    share = sum(c for row in rows for t, c, on in row if t and on) / sum(c for row in rows for t, c, _ in row if t)

    def drawing() -> Figure:
        top = 34 + 26 * len(lines)
        figure, axes = canvas(top + 34 + 22 * len(rows))
        label(axes, 14, 18, "One conversation, token by token: orange is trained on", color=INK, fontweight="bold")
        for number, line in enumerate(lines):
            x = 14.0
            for text, on, width in line:
                box(axes, x, 32 + 26 * number, width - 2, 21, ORANGE if on else GREY, 0.4 if on else 0.12)
                label(axes, x + width / 2 - 1, 43 + 26 * number, text, ha="center", color=INK, fontsize=10)
                x += width
        label(axes, 14, top + 16, "Rows of 256 tokens", color=INK, fontweight="bold")
        for number, row in enumerate(rows):
            _draw_row(axes, 280, top + 8 + 22 * number, row, lambda _, on: (ORANGE, 0.85) if on else (GREY, 0.3))
        for number, (text, colour, strength) in enumerate((("targets", ORANGE, 0.85), ("read, no loss", GREY, 0.3))):
            box(axes, 14, top + 32 + 22 * number, 14, 14, colour, strength)
            label(axes, 36, top + 39 + 22 * number, text)
        return figure

    answer = " ".join("".join(text for text, on in pieces if on).split())
    alt = (
        f"A conversation as tokens. Only the assistant's are trained on: {answer}. Below, {len(rows)} packed rows, in "
    )
    alt += f"which {100 * share:.0f}% of the tokens are targets."
    return Picture(name="mask", alt=alt, draw=drawing)


def rewards(course: Course) -> Picture:
    """Chapter 9: reward and length of the answers while a model finds out what the reward counts."""
    step = step_of(course.run, "rl")
    curves = [("reward", "Mean reward: short answers", "per answer"), ("completion_tokens", "Their length", "tokens"),
              ("entropy", "Entropy of the policy", "nats per token")]  # fmt: skip
    found = [(title, y, *step.series(key)) for key, title, y in curves if step.series(key)[0]]

    def drawing() -> Figure:
        figure, panels = framed(len(found), height=2.7)
        for panel, (title, y, xs, ys), colour in zip(panels, found, (GREEN, BLUE, ORANGE), strict=False):
            panel.plot(xs, ys, color=colour, marker="o", markersize=3)
            panel.set_ylim(bottom=0)
            name_axes(panel, title, "iteration", y)
        return figure

    told = ", ".join(f"{title.lower()} from {ys[0]:.2f} to {ys[-1]:.2f}" for title, _, _, ys in found)
    alt = f"Curves over {found[0][2][-1]:.0f} iterations: {told}."
    return Picture(name="rewards", alt=alt, draw=drawing)


def evaluation(course: Course) -> Picture:
    """Chapter 10: scores with their errors and chance, and pass@k."""
    chosen = {name: step_of(course.run, name).scores for name in ("eval_mid", "eval_sft", "eval_rl")}
    scores = {name.removeprefix("eval_"): found.tasks for name, found in chosen.items() if found}
    tasks = [
        task
        for task, measure in scores["sft"].items()
        if measure.chance and all(task in found for found in scores.values())
    ]
    samples, ks = 16, range(1, 17)

    def drawing() -> Figure:
        figure, (left, right) = framed(2, height=2.9)
        for place, (name, found) in enumerate(scores.items()):
            for row, task in enumerate(tasks):
                measure, y = found[task], row + 0.2 * (place - 1)
                error = measure.stderr or 0.0
                left.plot([100 * (measure.value - error), 100 * (measure.value + error)], [y, y],
                          color=COLOURS[place], linewidth=1.4)  # fmt: skip
                left.plot([100 * measure.value], [y], marker="o", linestyle="none", color=COLOURS[place],
                          label=name if row == 0 else "_")  # fmt: skip
                chance = 100 * (measure.chance or 0)
                left.plot([chance, chance], [row - 0.4, row + 0.4], color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
        left.set_yticks(range(len(tasks)), tasks)
        left.set(ylim=(len(tasks) - 0.4, -0.6), xlim=(0, 70))
        left.legend(fontsize=9.5, loc="lower right")
        name_axes(left, "Right answers ± one error", "% of 20 questions", "")
        for right_ones, colour in zip((1, 4, 8), COLOURS, strict=False):
            chances = [100 * (1 - comb(samples - right_ones, k) / comb(samples, k)) for k in ks]
            right.plot(ks, chances, color=colour, marker="o", markersize=3, label=f"{right_ones} of {samples} right")
        right.set_ylim(0, 104)
        right.legend(fontsize=9.5, loc="lower right")
        name_axes(right, "pass@k from 16 samples", "k", "% chance of a right one")
        return figure

    told = "; ".join(f"{name}: " + ", ".join(f"{task} {100 * found[task].value:.0f}%" for task in tasks)
                     for name, found in scores.items())  # fmt: skip
    alt = f"Left, accuracies with standard errors beside chance. {told}. Right, pass@k for 1, 4 and 8 right of 16."
    return Picture(name="evaluation", alt=alt, draw=drawing)


def sampling(course: Course) -> Picture:
    """Chapter 11: the likeliest next tokens at three temperatures, and what the KV cache saves."""
    model, tokenizer = course.base
    logits = model(mx.array([[tokenizer.bos, *tokenizer.encode("The capital of")]]))[0, -1]
    order = mx.argsort(-logits)[:10].tolist()
    chances = {t: np.array(mx.softmax(logits / t)) for t in (0.5, 1.0, 2.0)}
    words = [shown(tokenizer.decode([id_])) for id_ in order]
    lengths = np.arange(1, 257)

    def drawing() -> Figure:
        figure, (left, right) = framed(2, height=2.9)
        for (temperature, found), colour in zip(chances.items(), (ORANGE, BLUE, GREEN), strict=True):
            left.plot(range(len(order)), 100 * found[order], color=colour, marker="o", markersize=3.5,
                      label=f"temperature {temperature:g}")  # fmt: skip
        left.set_xticks(range(len(order)), words)
        left.set_ylim(bottom=0)
        left.legend(fontsize=9.5)
        name_axes(left, "After “The capital of”", "next token, likeliest first", "% chance")
        right.plot(lengths, lengths * (lengths + 1) / 2000, color=ORANGE, label="without a cache")
        right.plot(lengths, lengths / 1000, color=BLUE, label="with a KV cache")
        right.legend(fontsize=9.5)
        name_axes(right, "Positions computed for a text", "tokens", "thousand positions")
        return figure

    told = ", ".join(f"{100 * found[order[0]]:.0f}% at temperature {t:g}" for t, found in chances.items())
    alt = f"Left, chances of the next token after “The capital of”: “{words[0]}” has {told}. Right, positions computed "
    alt += "for a text: without a cache they grow with the square of its length, with one in proportion."
    return Picture(name="sampling", alt=alt, draw=drawing)


def seeds(course: Course) -> Picture:
    """Chapter 12: an improvement beside the scatter between seeds."""
    found: dict[bool, dict[int, float]] = {False: {}, True: {}}
    for job in course.seeds:
        is_changed = str(job["architecture.value_embeddings"]).lower() == "true"
        found[is_changed][int(job["seed"])] = float(job["pretrain.val_bpb"])
    pairs = [(found[False][seed], found[True][seed]) for seed in sorted(found[False])]

    def drawing() -> Figure:
        figure, (left, right) = framed(2, height=2.7)
        for (seed, pair), colour in zip(enumerate(pairs, 1), COLOURS, strict=False):
            left.plot([0, 1], pair, color=colour, marker="o", label=f"seed {seed}")
        left.set_xticks([0, 1], ["without", "value embeddings"])
        left.set_xlim(-0.4, 1.4)
        left.legend(fontsize=9.5)
        name_axes(left, "With and without the change", "", "bits per byte")
        gains = np.array([1000 * (before - after) for before, after in pairs])
        error = gains.std(ddof=1) / len(gains) ** 0.5
        right.plot(gains, [0] * len(gains), marker="o", linestyle="none", color=BLUE)
        right.errorbar([gains.mean()], [-0.5], xerr=[4.3 * error], marker="s", color=ORANGE, capsize=3)
        right.axvline(0, color=SOFT, linewidth=1)
        right.set(ylim=(-1, 0.5), yticks=[0, -0.5])
        right.set_yticklabels(["gains", "mean ± 95%"])
        name_axes(right, "Gain of each pair", "thousandths of a bit per byte", "")
        return figure

    told = ", ".join(f"seed {seed} {before:.4f} and {after:.4f}" for seed, (before, after) in enumerate(pairs, 1))
    alt = f"Bits per byte without and with value embeddings: {told}. Right, the gain of each pair, and their mean with "
    alt += "its interval of 95%, which includes zero."
    return Picture(name="seeds", alt=alt, draw=drawing)


if __name__ == "__main__":
    main()
