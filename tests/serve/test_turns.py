"""Conversations over HTTP: prefix reuse in the KV cache, and programs."""

from typing import Any


def talk(server: Any, turns: int, **body: Any) -> list[str]:
    messages, said = [], []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"the cat sat {turn}"})
        answer = server.chat(messages=messages, max_tokens=8, **body).json()["choices"][0]["message"]
        messages.append({"role": "assistant", "content": answer.get("parts", answer["content"])})
        said.append(answer["content"])
    return said


def test_next_turn_reuses_the_prefix(start):
    with start(says="yes", seconds=0.0) as server:
        read: list[int] = []
        server.until(lambda: len(server.worker.loaded) == 1)
        (scheduler,) = server.worker._schedulers.values()
        decoder = scheduler.source.decoder
        own = decoder.read
        decoder.read = lambda prompts, *past: read.extend(map(len, prompts)) or own(prompts, *past)
        talk(server, 4)
        metrics = server.client.get("/metrics").text
    prompt = float(metrics.split("\nmlxchat_prompt_tokens_total ")[1].split("\n")[0])
    reused = float(metrics.split("\nmlxchat_reused_prompt_tokens_total ")[1].split("\n")[0])
    assert sum(read) + reused + 4 == prompt, "but for the last token of each prompt, which is decoded"
    assert reused > prompt / 3


def test_seeded_answers_do_not_depend_on_the_cache(start):
    with start(limits={"kept_tokens": 0}) as alone:
        seeded, greedy = talk(alone, 4, seed=5, temperature=1.0), talk(alone, 4, temperature=0)
    with start() as server:
        talk(server, 4)
        assert talk(server, 4, seed=5, temperature=1.0) == seeded
        assert talk(server, 4, temperature=0) == greedy
