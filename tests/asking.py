"""Asking a model through the real client, as the tests of chat on Ray Serve do."""

from typing import Any

import openai

ASKED: list[Any] = [{"role": "user", "content": "Say 3."}]
MAX_TOKENS = 16


def ask(client: openai.OpenAI, model: str) -> str:
    """The greedy answer to `ASKED`."""
    completion = client.chat.completions.create(model=model, messages=ASKED, temperature=0, max_tokens=MAX_TOKENS)
    return completion.choices[0].message.content or ""


def streamed(client: openai.OpenAI, model: str) -> str:
    """The same, piece by piece."""
    chunks = client.chat.completions.create(
        model=model, messages=ASKED, temperature=0, max_tokens=MAX_TOKENS, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
