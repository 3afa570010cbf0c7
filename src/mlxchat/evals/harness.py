"""Our models in lm-evaluation-harness (lm_eval), as `--model mlxchat`.

    python -m mlxchat.evals.harness run --model mlxchat --model_args path=sft --tasks hellaswag

is lm_eval's own command line with this model registered. Text is scored after <|bos|>, as in training; text beyond the
model's context is computed, as in CORE. Requires the extra `harness`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mlxchat.data.tokenizer import render_for_completion
from mlxchat.engine.batch import Request
from mlxchat.engine.generate import Engine
from mlxchat.engine.sample import Sampling
from mlxchat.errors import MlxchatError
from mlxchat.model.checkpoint import load_for_inference
from mlxchat.model.scoring import continuation
from mlxchat.store.naming import find
from mlxchat.store.store import Store

_WINDOW_REQUESTS = 512  # requests that are sorted by length before batching


@register_model("mlxchat")
class HarnessModel(TemplateLM):
    """Our checkpoint as a model of lm_eval."""

    def __init__(
        self, path: str, outputs: str = "outputs", batch_tokens: int = 8192, max_gen_toks: int = 256, **ignored: Any
    ) -> None:
        """Load a folder with a checkpoint, or a model by any name that `mlxchat show` takes.

        `max_gen_toks` is for tasks that set no limit. lm_eval's batch_size, max_batch_size and device are ignored.
        """
        super().__init__()
        folder = Path(path) if Path(path).is_dir() else find(Store(Path(outputs)), path).place
        model, self._own_tokenizer, _ = load_for_inference(folder)
        self._engine = Engine(model, self._own_tokenizer, batch_tokens=int(batch_tokens))
        self._max_gen_toks, self._name = int(max_gen_toks), folder.name

    @property
    def eot_token_id(self) -> int:
        """<|bos|>, which separates documents."""
        return self._own_tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the checkpoint; lm_eval's cache key."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return ids after <|bos|>, if wanted; a text that begins with <|bos|> is a chat with special tokens."""
        if string.startswith("<|bos|>"):
            return self._own_tokenizer.encoding.encode(string, allowed_special="all")
        ids = self._own_tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text with special tokens, up to the assistant's next message."""
        return self._own_tokenizer.decode(render_for_completion(self._own_tokenizer, {"messages": chat_history}))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of the only template."""
        return "mlxchat" if chat_template else ""

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in lm_eval's windows of the context length."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self._engine.context_tokens, context_len=1)
            scored = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(scored, disable_tqdm=True)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers, decoded in batches; greedy unless the task sets `do_sample`."""
        scheduler = self._engine.scheduler()
        answers: dict[int, str] = {}
        for context, given in (each.args for each in requests):
            settings = normalize_gen_kwargs(given, default_max_gen_toks=self._max_gen_toks)
            most = max(1, min(settings["max_gen_toks"], self._engine.context_tokens - 1))
            how = {name: settings[name] for name in ("top_k", "top_p", "seed") if name in settings}
            sampling = Sampling(temperature=settings["temperature"] if settings["do_sample"] else 0.0, **how)
            prompt = self.tok_encode(context)[-(self._engine.context_tokens - most) :]
            until = tuple(settings["until"])
            request = Request(
                prompt=prompt, max_new_tokens=most, sampling=sampling, stop=until, tools=False, reuse=True
            )
            answers[scheduler.submit(request)] = ""
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            while not scheduler.idle:
                for event in scheduler.step():
                    answers[event.id] += event.text
                    bar.update(event.finish_reason is not None)
        return list(answers.values())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for start in range(0, len(requests), _WINDOW_REQUESTS):
                window = requests[start : start + _WINDOW_REQUESTS]
                rows = [continuation([*context, *text], len(context)) for _, context, text in window]
                scores = self._engine.score(rows, ("losses", "likeliest"))
                for row, (losses, likeliest) in zip(rows, scores, strict=True):
                    found.append((-float(losses.sum(dtype="float64")), bool((likeliest == row.targets).all())))
                bar.update(len(rows))
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MlxchatError as error:
        sys.exit(f"error: {error}")
