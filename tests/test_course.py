"""The course: each chapter has its parts, and its pictures come from docs/course_pictures.py."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mlxchat.data.conversation import render_conversation
from mlxchat.data.mixture import Mixture
from mlxchat.data.tokenizer import Tokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs"


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
