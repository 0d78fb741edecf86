"""The objects of OpenAI's models and chat API. The reference is the client's own types, `openai.types.chat`."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from events.config import optional
from trainers.data.dialog import Message
from trainers.data.rows import without_empty
from trainers.errors import Problem


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class OpenAIModel(_Answer):
    """A model that can be asked and trained: a base model, a job's or a checkpoint."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970; 0 for a model that hasn't been fetched yet.")
    owned_by: str


class OpenAIModelList(_Answer):
    """Every model that has a name of its own here."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


def _as_system(role: object) -> object:
    return "system" if role == "developer" else role


class OpenAIChatMessage(Message):
    """A message, as rows of training data have them. `developer` is another name of `system`."""

    role: Annotated[
        Literal["system", "user", "assistant", "tool", "ipython"],
        BeforeValidator(_as_system, json_schema_input_type=Literal["developer", "system", "user", "assistant", "tool"]),
    ]


class OpenAIStreamOptions(BaseModel):
    """What a stream sends besides the answer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_usage: bool | None = optional("Send a last chunk with the number of tokens. Default: false.")
    include_obfuscation: Literal[False] | None = optional("Only `false`: streams are never obfuscated.")


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=4)]


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class OpenAIChatRequest(BaseModel):
    """What POST /v1/chat/completions takes. A field that isn't here is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    model: str = Field(
        min_length=1, max_length=1024, description="A name from GET /v1/models, or any base model that jobs take."
    )
    messages: list[OpenAIChatMessage] = Field(
        min_length=1, max_length=10_000, description="The dialog, in order. A system message must come first."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = optional(
        "Maximum number of tokens in the answer. Default: all that the model's context leaves."
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = optional("The old name of max_completion_tokens.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = optional("0: always the likeliest token. Default: 1.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = optional(
        "Draw from the likeliest tokens that hold this share of the probability. Default: 1."
    )
    stop: Annotated[StopTexts, BeforeValidator(_as_list, json_schema_input_type=StopText | StopTexts)] = Field(
        default=[], description="Texts before which the answer ends. Default: none."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = optional(
        "The same seed gives the same answer. Default: none."
    )
    n: Literal[1] | None = optional("Only 1: there is one answer.")
    stream: bool | None = optional("Send the answer as server-sent events while it is made. Default: false.")
    stream_options: OpenAIStreamOptions | None = optional("Only with `stream`. Default: none.")
    user: str | None = optional("Accepted and ignored.")
    metadata: dict[str, str] | None = optional("Accepted and ignored.")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "store": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "service_tier": ("auto", "default"),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's API that are not supported, and the values of each accepted because they ask for nothing."""


def without_unsupported(document: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The request without nulls and unsupported fields, and a problem for each of these that asks for something."""
    problems = [
        Problem(name, "is not offered by this service: leave it out", "not_offered")
        for name, value in document.items()
        if name in _NEUTRAL and value is not None and not any(_same(value, neutral) for neutral in _NEUTRAL[name])
    ]
    rest = {name: value for name, value in document.items() if name not in _NEUTRAL and value is not None}
    if isinstance(messages := rest.get("messages"), list):
        # Clients send answers back as messages, with fields that are null or empty.
        rest["messages"] = [_without_nulls(message) for message in messages]
    return rest, problems


def _without_nulls(message: object) -> object:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in without_empty(message).items() if value is not None}


def _same(value: object, neutral: object) -> bool:
    """Equality as in JSON, where true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class OpenAIUsage(_Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class OpenAIChatAnswer(_Answer):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class OpenAIChatChoice(_Answer):
    """The one answer. `length`: it was cut at max_tokens, or where the model's context ends."""

    index: Literal[0] = 0
    message: OpenAIChatAnswer
    finish_reason: FinishReason
    logprobs: None = None


class OpenAIChatCompletion(_Answer):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[OpenAIChatChoice]
    usage: OpenAIUsage


class OpenAIChatDelta(_Answer):
    """What is new. The chunk that ends the answer has no fields here."""

    role: Literal["assistant"] | None = optional("Only in the first chunk.")
    content: str | None = optional("The next piece of the answer.")

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialise: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {name: value for name, value in serialise(self).items() if value is not None}


class OpenAIChunkChoice(_Answer):
    """A piece of the one answer."""

    index: Literal[0] = 0
    delta: OpenAIChatDelta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class OpenAIChatChunk(_Answer):
    """The `data` of one event of a stream, which ends with `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[OpenAIChunkChoice] = Field(description="Empty in the chunk with the usage.")
    usage: OpenAIUsage | None = None
