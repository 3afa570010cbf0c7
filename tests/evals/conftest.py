"""A small random model."""

import pytest

from kit.models import make_model
from mlxchat.model.gpt import GPT


@pytest.fixture
def model() -> GPT:
    return make_model(num_layers=3, scale=0.3)
