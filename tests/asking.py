"""The official `openai` client for tests of a service on Ray Serve, and a question to ask a model with it."""

from typing import Any

import openai

from tests.waiting import WAIT_S

ASKED: list[Any] = [{"role": "user", "content": "Say 3."}]
MAX_TOKENS = 16


def client_of(url: str, timeout_s: float = WAIT_S) -> openai.OpenAI:
    """A client of the service at that URL, which ignores proxies that the environment names."""
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=timeout_s, http_client=http)


def ask(client: openai.OpenAI, model: str) -> str:
    """The greedy answer to `ASKED`."""
    completion = client.chat.completions.create(model=model, messages=ASKED, temperature=0, max_tokens=MAX_TOKENS)
    return completion.choices[0].message.content or ""


def streamed(client: openai.OpenAI, model: str) -> str:
    """As `ask`, with a streamed answer."""
    chunks = client.chat.completions.create(
        model=model, messages=ASKED, temperature=0, max_tokens=MAX_TOKENS, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
