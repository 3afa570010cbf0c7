"""engine_*.json: the calculator's protocol, sampling, and greedy decoding of both snapshots."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from compare_tasks import our_rule
from comparison import Comparison, Quantity, largest, same
from parity_file import ParityFile

from kit.scripted import ScriptedDecoder
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine import generate
from mlxchat.engine.generate import Completion, Engine
from mlxchat.engine.sample import Sampler, Sampling
from mlxchat.engine.tools import calculate

VARIANTS = ("oct2025", "jul2026")
PROBABILITY = 1e-6
_DRAWS = 20_000
_UNLIMITED = 1000
# If two logits are closer than this, rounding decides, and either token is right.
_TIE = 4e-4


def protocol(file: ParityFile) -> Iterator[Comparison]:
    """Compare tokens and masks of scripted rows, where the calculator gives nanochat's answers."""
    tokenizer, pairs, answers = file.tokenizer(), [], []
    for case in file.json["scripted"]:
        rows = [_row(tokenizer, case, row) for row in range(len(case["scripts"]))]
        calls = [call for row in rows for call in _calls(tokenizer, *row)]
        answers += [call[:2] for call in calls if call[2]]
        with _calculator({expression: answer for expression, answer, _ in calls}.get):
            got = _run(file, tokenizer, case["scripts"], case["max_tokens"])
        pairs += [
            (f"{case['name']}, row {number}", (completion.ids, completion.mask), row)
            for number, (completion, row) in enumerate(zip(got, rows, strict=True))
        ]
    yield same("tokens and masks of the calculator's protocol", pairs)
    rules = [(expression, our_rule(expression, answer)) for expression, answer in answers]
    yield same(
        "the calculator's answers in it, by our rule",
        [(expression, calculate(expression), wanted) for expression, wanted in rules if wanted != "skip"],
    )


def refusals(file: ParityFile) -> Iterator[Comparison]:
    """Compare a call of exit() in the calculator and the first tokens of rows.

    Not compared: results above 4300 digits, since ours refuses those above 1e15, and inputs that are no lists of ids.
    """
    values, tokenizer = file.json, file.tokenizer()
    if "exit_in_expression" in values:
        case = values["exit_in_expression"]["jul2026"]
        (got,) = _run(file, tokenizer, [case["script"]], None)
        ended = got.ids[:-1] if got.ids and got.ids[-1] in (tokenizer.assistant_end, tokenizer.bos) else got.ids
        yield same("exit() in an expression", [("tokens", [*values["prompt"], *ended], case["batch_results"][0])])
    if "first_token_of_64_rows" in values:
        drawn = [_draw(np.zeros(32), 1.0, None, _row_generator(0, row))[0] for row in range(64)]
        shared = values["first_token_of_64_rows"]["jul2026"]["all_rows_share_the_first_token"]
        yield same("rows share their first token", [("64 rows", len(set(drawn)) == 1, shared)])


def distributions(file: ParityFile) -> Iterator[Comparison]:
    """Compare the exact distribution that tokens are drawn from, and the frequencies of many draws."""
    exact, argmax, shares = {}, [], {}
    for number, case in enumerate(file.json["sampling"]):
        if "error" in case:  # our configuration refuses these earlier
            continue
        # top_k is off with null in ours and with 0 in jul2026; our configuration refuses other values below 1.
        top_k = case["top_k"] if case["top_k"] is None or case["top_k"] > 0 else None
        logits = np.array(case["logits"], np.float32)
        name = f"{number}: temperature {case['temperature']}, top_k {case['top_k']}"
        if "argmax" in case:
            got = [_draw(row, case["temperature"], top_k, _row_generator(0, 0))[0] for row in logits]
            argmax.append((name, got, case["argmax"]))
            continue
        expected = np.array(case["probs"])
        found = _distribution(logits, case["temperature"], top_k)
        exact[name] = float(np.abs(found - expected).max())
        for row, wanted in enumerate(expected):
            draws = _row_generator(0, row)
            drawn = _draw(logits[row], case["temperature"], top_k, draws, _DRAWS)
            share = np.bincount(drawn, minlength=logits.shape[1]) / _DRAWS
            if (share[wanted == 0] > 0).any():
                shares[f"{name}, row {row}"] = float("inf")
                continue
            deviation = np.sqrt(wanted * (1 - wanted) / _DRAWS) + 2e-4
            shares[f"{name}, row {row}"] = float((np.abs(share - wanted) / deviation).max())
    yield largest("probabilities that are drawn from", exact, PROBABILITY)
    # Among hundreds of shares, some are several standard errors off by chance.
    yield largest("shares of many draws, in standard errors", shares, 6)
    if argmax:
        yield same("tokens at temperature 0", argmax)


def greedy(file: ParityFile) -> Iterator[Comparison]:
    """Compare greedy continuations, which may contain special tokens."""
    tokenizer = file.tokenizer()
    for variant in VARIANTS:
        model, pairs = file.core_model(variant), []
        for number, case in enumerate(file.json["greedy"][variant]):
            if case["min_top2_logit_gap"] >= _TIE:
                (completion,) = Engine(model, tokenizer).complete([case["prompt"]], max_new_tokens=case["max_tokens"])
                pairs.append((f"prompt {number}", completion.ids, case["tokens"]))
        yield same(f"greedy continuations, {variant}", pairs)


QUANTITIES: tuple[Quantity, ...] = (protocol, refusals, distributions, greedy)


def _run(file: ParityFile, tokenizer: Tokenizer, scripts: list[list[int]], limit: int | None) -> list[Completion]:
    """Return the completions of scripted rows. As in nanochat, all start with the first script's first token."""
    scripts = [[scripts[0][0], *script[1:]] for script in scripts]
    shortest, filler = len(file.json["prompt"]), file.json["filler_token"]
    prompts = [file.json["prompt"] + [filler] * row for row in range(len(scripts))]
    nothing: Any = SimpleNamespace(sizes=SimpleNamespace(context_tokens=1 << 20))
    engine = Engine(nothing, tokenizer)
    scripts = [[*script, filler] for script in scripts]
    engine.decoder = ScriptedDecoder(scripts, tokenizer.vocab_size, shortest=shortest - 1)
    return engine.complete(prompts, max_new_tokens=_UNLIMITED if limit is None else limit)


def _row(tokenizer: Tokenizer, case: dict[str, Any], row: int) -> tuple[list[int], list[int]]:
    """Return the tokens and the mask of a row up to its end; nanochat keeps computing rows that have ended."""
    ids, mask = [column[row] for column in case["columns"]], [column[row] for column in case["masks"]]
    ends = [place for place, token in enumerate(ids) if token in (tokenizer.assistant_end, tokenizer.bos)]
    stop = ends[0] + 1 if ends else len(ids)
    return ids[:stop], mask[:stop]


def _calls(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> Iterator[tuple[str, str | None, bool]]:
    """Yield every expression of a row, the answer forced after it, and whether that answer is complete."""
    special, call = tokenizer.special_ids, None
    for place, token in enumerate(ids):
        if token == special["<|python_start|>"]:
            call = []
        elif token == special["<|python_end|>"] and call is not None:
            answer, is_whole = None, False
            if ids[place + 1 : place + 2] == [special["<|output_start|>"]] and mask[place + 1] == 0:
                stop = place + 2
                while stop < len(ids) and ids[stop] != special["<|output_end|>"]:
                    stop += 1
                answer, is_whole = tokenizer.decode(ids[place + 2 : stop]), stop < len(ids)
            yield tokenizer.decode(call), answer, is_whole
            call = None
        elif call is not None:
            call.append(token)


@contextmanager
def _calculator(answer: Callable[[str], str | None]) -> Iterator[None]:
    own, generate.calculate = generate.calculate, answer
    try:
        yield
    finally:
        generate.calculate = own


def _distribution(
    logits: np.ndarray[Any, Any], temperature: float, top_k: int | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the probabilities (B, V) that tokens are drawn with."""
    sampler = Sampler([Sampling(temperature=temperature, top_k=top_k)] * len(logits))
    ids, probabilities = sampler.distribution(mx.array(logits.astype(np.float32)))
    values = np.asarray(probabilities).astype(np.float64)
    found = np.zeros(logits.shape)
    np.put_along_axis(found, np.indices(logits.shape)[1] if ids is None else np.asarray(ids), values, axis=1)
    return found / found.sum(-1, keepdims=True)


def _draw(
    logits: np.ndarray[Any, Any], temperature: float, top_k: int | None, draws: np.random.Generator, count: int = 1
) -> list[int]:
    """Return `count` tokens."""
    sampler = Sampler([Sampling(temperature=temperature, top_k=top_k)] * count)
    rows = mx.array(np.tile(logits.astype(np.float32), (count, 1)))
    return [int(token) for token in np.asarray(sampler(rows, draws.random(count).tolist()))]


def _row_generator(seed: int, row: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, row])))
