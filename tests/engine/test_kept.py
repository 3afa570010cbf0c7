"""Prefix reuse: lookup, LRU bound, exactness."""

from typing import Any

import mlx.core as mx
import pytest

from kit.models import make_model
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.cache import KeptPasts
from mlxchat.engine.generate import Engine
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Event, Request, Scheduler
from mlxchat.model.gpt import GPT

PIECE = 32


class Named:
    def __init__(self, name: str, tokens: int | None = None) -> None:
        self.name, self.tokens = name, tokens

    def begun(self, tokens: int) -> "Named":
        return Named(self.name, tokens)


def found(kept: KeptPasts, prompt: list[int], *, exactly: bool = False) -> tuple[str | None, int, int]:
    past, tokens, exact = kept.find(prompt, PIECE, exactly=exactly)
    assert past is None or past.tokens == tokens
    return past and past.name, tokens, exact


def test_longest_common_prefix_is_found():
    kept = KeptPasts(1000)
    kept.keep([*range(40), 98], Named("other"), 41)
    kept.keep([*range(40), *range(100, 160)], Named("long"), 70)
    assert found(kept, [*range(40), 98]) == ("other", 40, 32)
    assert found(kept, [*range(40), *range(100, 130), 7]) == ("long", 70, 64)
    assert found(kept, [*range(40), *range(100, 130), 7], exactly=True) == ("long", 64, 64)
    assert found(kept, [5, *range(40)]) == (None, 0, 0)
    assert found(kept, [*range(10), 99, 98]) == (None, 0, 0), "too short"


def test_longer_prefix_replaces_the_shorter():
    kept = KeptPasts(1000)
    for turn in range(1, 5):
        kept.keep(list(range(50 * turn)), Named(str(turn)), 50 * turn)
    assert kept.num_tokens == 200
    kept.keep(list(range(50)), Named("again"), 50)
    assert kept.num_tokens == 200, "cached already"


def test_least_recently_used_prefix_is_dropped():
    kept = KeptPasts(100)
    for first in (1, 2):
        kept.keep([first] * 50, Named(str(first)), 50)
    assert found(kept, [1] * 51)[0] == "1"
    kept.keep([3] * 50, Named("3"), 50)
    assert [found(kept, [first] * 51)[0] for first in (1, 2, 3)] == ["1", None, "3"]
    kept.keep([4] * 101, Named("4"), 101)
    assert kept.num_tokens == 100


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_kept_past_does_not_hold_the_batch(path, tokenizer, kv_bits):
    """Guards against slices that keep the whole batch's arrays in memory."""
    model = make_model(width=128, num_heads=2)
    forward: Any = Engine(model, tokenizer, kv_bits=kv_bits).forward()
    forward.reserve(4, 2000)
    forward.fill(1, forward.read(list(range(20)), None, None))
    mx.clear_cache()
    before = mx.get_active_memory()
    past = forward.past_of(1, 20)
    forward.clear()
    mx.clear_cache()
    batch = before - mx.get_active_memory()
    per_token = model.sizes.num_layers * model.sizes.num_kv_heads * forward.decoder.format.bytes_per_token()
    assert past.tokens == 20
    assert batch > 0.9 * 4 * 2000 * per_token


def run(scheduler: Scheduler) -> list[Event]:
    events = []
    while not scheduler.idle:
        events += scheduler.step()
    return events


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, model: GPT, tokenizer: Tokenizer) -> tuple[Scheduler, list[int]]:
    """Return a scheduler, and the list of its chunk sizes."""
    scheduler, sizes = Engine(model, tokenizer).scheduler(prefill_tokens=PIECE), []
    forward: Any = scheduler.forward
    own = forward.read
    monkeypatch.setattr(forward, "read", lambda ids, *past: sizes.append(len(ids)) or own(ids, *past))
    return scheduler, sizes


def talk(scheduler: Scheduler, prompt: list[int], reuse: Any, seed: int = 1) -> list[tuple[int | None, float | None]]:
    sampling = Sampling(temperature=1.0, seed=seed)
    scheduler.submit(Request(prompt=prompt, max_new_tokens=12, sampling=sampling, reuse=reuse, logprobs=0))
    return [(event.token, event.logprob) for event in run(scheduler)]


def test_exact_reuse_is_bit_identical(read, tokenizer):
    scheduler, sizes = read
    first = [tokenizer.bos, *range(50)]
    answer = [token or 0 for token, _ in talk(scheduler, first, "close")]
    second = [*first, *answer, *range(60, 80)]
    talk(scheduler, second, "close")
    third = [*second, *range(30)]
    alone = talk(Engine(*_parts(scheduler)).scheduler(prefill_tokens=PIECE), third, "off")
    sizes.clear()
    assert talk(scheduler, third, "exact") == alone
    assert sizes[0] == PIECE, "the first chunk was cached"
    assert sum(sizes) == len(third) - 1 - PIECE


def test_close_pasts_are_not_shared_with_exact_requests(read, tokenizer):
    scheduler, _ = read
    first = [tokenizer.bos, *range(50)]
    answer = [token or 0 for token, _ in talk(scheduler, first, "close")]
    second = [*first, *answer, *range(60, 80)]
    alone = talk(Engine(*_parts(scheduler)).scheduler(prefill_tokens=PIECE), second, "off")
    sampling, modes = Sampling(temperature=1.0, seed=1), ("close", "off", "exact")
    requests = [Request(prompt=second, max_new_tokens=12, sampling=sampling, reuse=mode, logprobs=0) for mode in modes]
    ids = [scheduler.submit(request) for request in requests]
    events = run(scheduler)
    for id in ids[1:]:
        assert [(event.token, event.logprob) for event in events if event.id == id] == alone


def _parts(scheduler: Scheduler) -> tuple[GPT, Tokenizer]:
    forward: Any = scheduler.forward
    return forward.model, scheduler.tokenizer
