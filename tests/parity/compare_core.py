"""core_*.json and core_model*.safetensors: what evaluates a base model; the models are compared by other files too."""

from __future__ import annotations

from collections.abc import Iterator

from comparison import Comparison, Line, Quantity, Unchecked, UnreadableError
from parity_file import ParityFile

from mlxchat.model.sizing import count_parameters

_MEANINGS = {
    "render": "prompts and scored spans of CORE",
    "find_common_length": "common beginnings and ends of prompts",
    "stack_sequences": "padding of prompts",
    "fewshot_draws": "draws of examples",
    "too_few_items_for_the_shots": "too few examples",
    "tasks": "results of CORE's tasks, item by item",
    "cropping": "results with cropped prompts",
    "suite": "the CORE metric",
    "suite_shuffle": "the order of a suite's items",
    "chat_categorical": "answers by the logits of letters",
    "chatcore": "the ChatCORE metric",
}


def evaluation(file: ParityFile) -> Iterator[Line]:
    """Say what nothing compares yet, or check that a model has the parameters of its sizes."""
    if file.path.suffix == ".json":
        known = [key for key in file.json if key in _MEANINGS]
        if not known:
            raise UnreadableError(
                f"{file.path}: has none of {', '.join(_MEANINGS)}; it is not in the format of core_*.json"
            )
        for key in known:
            yield Unchecked(_MEANINGS[key], "this project has no CORE evaluation")
        return
    file.model("")
    weights = sum(value.size for value in file.weights("").values())
    yield Comparison("number of parameters", abs(count_parameters(file.sizes)["total"] - weights), 0)


QUANTITIES: tuple[Quantity, ...] = (evaluation,)
