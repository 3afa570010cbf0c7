"""An engine with scripted answers."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kit.models import ScriptedDecoder
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., tuple[Engine, list[list[int]]]]:
    def make(*scripts: Sequence[int]) -> tuple[Engine, list[list[int]]]:
        """Return an engine that follows the scripts, and a prompt for each."""
        nothing: Any = SimpleNamespace(sizes=SimpleNamespace(context_tokens=1000))
        engine = Engine(nothing, tokenizer)
        engine.decoder = ScriptedDecoder([[*script, 32] for script in scripts], tokenizer.vocab_size)
        return engine, [[tokenizer.bos] * (1 + row) for row in range(len(scripts))]

    return make
