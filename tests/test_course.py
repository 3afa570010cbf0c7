"""The course: each chapter has its parts, and its pictures come from docs/course_pictures.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mlxchat.data.conversation import render_conversation
from mlxchat.data.mixture import Mixture
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.report.document import standalone

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHAPTERS = sorted((DOCS / "course").glob("*.md"))


@pytest.fixture(scope="module")
def pictures() -> Iterator[ModuleType]:
    """Load docs/course_pictures.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("course_pictures", DOCS / "course_pictures.py")
    assert spec
    assert spec.loader
    module = sys.modules["course_pictures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["course_pictures"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=[chapter.stem for chapter in CHAPTERS])
def test_chapter_has_picture_command_output_code_faults_and_solution(chapter: Path) -> None:
    text = chapter.read_text(encoding="utf-8")
    assert re.search(r"!\[[^\]]{40,}\]\(\.\./pictures/course/\w+\.svg\)", text)
    assert re.search(r"```bash\n.*?```\n\n```text\n", text, re.S)
    assert re.search(r"^## The code\n.*?\]\(\.\./", text, re.M | re.S)
    assert re.search(r"^## What goes wrong$", text, re.M)
    assert re.search(r'^    \?\?\? note "Solution"\n\n {8}\S', text, re.M)


def test_every_picture_is_small_described_and_shown_once() -> None:
    text = "".join(chapter.read_text(encoding="utf-8") for chapter in CHAPTERS)
    files = sorted((DOCS / "pictures" / "course").glob("*.svg"))
    assert [text.count(f"pictures/course/{file.name})") for file in files] == [1] * len(CHAPTERS)
    for file in files:
        svg = file.read_text(encoding="utf-8")
        assert len(svg) < 40_000
        assert re.search('aria-label="[^"]{40,}"', svg)
        assert "prefers-color-scheme: dark" in svg


def test_packed_rows_show_each_token_and_target_once(pictures: ModuleType) -> None:
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    course = pictures.Course(Path())
    course.__dict__["tokenizers"] = [tokenizer]
    mixture = Mixture(course.config.sft.mixture, seed=1)
    rendered = [render_conversation(tokenizer, mixture[place], max_tokens=None) for place in range(300)]
    whole = sorted((len(ids), sum(mask)) for ids, mask in rendered if len(ids) <= 257)
    for row in pictures.packed(course, "sft", mixture, 5):
        ends = [place for place, (task, _, _) in enumerate(row) if not task]
        assert sum(count for _, count, _ in row) <= 257
        for begin, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            counts = np.array([(count, count * on) for _, count, on in row[begin:end]]).sum(axis=0)
            # The first token of a row is no target, and shown with its conversation all the same.
            assert any(abs(length - counts[0]) <= (begin == 0) and trained == counts[1] for length, trained in whole), (
                counts,
                begin,
            )


def test_same_numbers_give_the_same_picture(pictures: ModuleType) -> None:
    jobs = [
        {
            "architecture.value_embeddings": changed,
            "seed": seed,
            "pretrain.val_bpb": 2.9 - 0.001 * seed - 0.01 * changed,
        }
        for changed in (False, True)
        for seed in (1, 2, 3)
    ]
    drawn = []
    for order in (jobs, jobs[::-1]):
        course = pictures.Course(Path())
        course.__dict__["seeds"] = order
        drawn.append(standalone(pictures.seeds(course)))
    assert drawn[0] == drawn[1]
    assert "seed 1 2.8990 and 2.8890" in drawn[0]
