"""Rendering of conversations: exactly the assistant's own tokens are trained on."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlxchat.data.tokenizer import Tokenizer, render_conversation, render_for_completion


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def talk(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


CALL = assistant([part("text", "It is "), part("python", "6*7"), part("python_output", "42"), part("text", "42.")])


def shown(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """Return the text with trained parts in square brackets."""
    text, trained = "", 0
    for token, bit in zip(ids, mask, strict=True):
        text += {(0, 1): "[", (1, 0): "]"}.get((trained, bit), "") + tokenizer.decode([token])
        trained = bit
    return text + "]" * trained


def render(tokenizer: Tokenizer, conversation: dict[str, Any]) -> str:
    return shown(tokenizer, *render_conversation(tokenizer, conversation))


def test_rendered_text_and_mask_are_exact(tokenizer):
    assert render(tokenizer, talk(user("6*7?"), CALL, user("c"), assistant("d"))) == (
        "<|bos|><|user_start|>6*7?<|user_end|><|assistant_start|>[It is <|python_start|>6*7<|python_end|>]"
        "<|output_start|>42<|output_end|>[42.<|assistant_end|>]"
        "<|user_start|>c<|user_end|><|assistant_start|>[d<|assistant_end|>]"
    )


def test_a_long_completion_prompt_keeps_its_end(tokenizer):
    """nanochat cuts prompts at 2,048 tokens, so that the question's end is lost."""
    prompt = render_for_completion(tokenizer, talk(user("1 2 " * 2000 + "?"), assistant("b")))
    assert len(prompt) > 8000
    assert tokenizer.decode(prompt[-3:]) == "?<|user_end|><|assistant_start|>"


# What is trained on, for any conversation

PARTS = st.lists(st.builds(part, st.sampled_from(["text", "python", "python_output"]), st.text(max_size=6)), max_size=4)
ANSWERS = st.one_of(st.text(max_size=8), PARTS)
TURNS = st.lists(st.tuples(st.text(max_size=8), ANSWERS), min_size=1, max_size=3)


@given(turns=TURNS, system=st.none() | st.text(max_size=5))
def test_exactly_the_assistants_text_calls_and_ends_are_trained(tokenizer, turns, system):
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids, mask = render_conversation(tokenizer, talk(*messages))

    special, expected = tokenizer.special_ids, []
    for _, answer in turns:
        for each in [part("text", answer)] if isinstance(answer, str) else answer:
            tokens = tokenizer.encode(each["text"])
            if each["type"] == "text":
                expected += tokens
            elif each["type"] == "python":
                expected += [special["<|python_start|>"], *tokens, special["<|python_end|>"]]
        expected.append(special["<|assistant_end|>"])
    assert [token for token, bit in zip(ids, mask, strict=True) if bit] == expected
    assert set(mask) <= {0, 1}
    assert ids[0] == tokenizer.bos
