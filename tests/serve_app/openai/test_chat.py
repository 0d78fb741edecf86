"""Chat through the real client: a real model answers, in this process; only Ray is left out."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from safetensors.torch import load_file, save_file

from events.facts import CheckpointsDeleted, JobSucceeded
from serve_app.chat.torchtune_engine import TorchtuneEngine
from tests.generated import generated
from tests.serve_app.live_server import Server
from tests.serve_app.openai.conftest import connected
from tests.tiny_models import make_tiny_model
from tests.waiting import eventually
from trainers.answers import Part, Piece, Question
from trainers.data.chat import ChatTokenizer
from trainers.errors import UserError
from trainers.models import chat_model
from trainers.models.chat_model import Answering, ChatModel

ASKED: list[Any] = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is the capital?"}]
GREEDY: dict[str, Any] = {"messages": ASKED, "temperature": 0, "max_completion_tokens": 24}
WAIT_S = 60.0


@pytest.fixture(scope="module")
def model(server: Server) -> str:
    return str(make_tiny_model(server.parts.settings.storage / "tiny"))


@pytest.fixture(scope="module")
def endless(server: Server) -> str:
    """A model that goes on for longer than any test waits, unless it is stopped."""
    return str(make_tiny_model(server.parts.settings.storage / "endless", max_position_embeddings=1 << 20))


def greedy(model: str, messages: Sequence[Any] = ASKED, max_new_tokens: int = 24) -> tuple[list[int], str]:
    return generated(Path(model), messages, max_new_tokens)


def ask(client: openai.OpenAI, model: str, **changes: Any) -> ChatCompletion:
    completion: ChatCompletion = client.chat.completions.create(model=model, **GREEDY | changes)
    return completion


def stream(client: openai.OpenAI, model: str, **changes: Any) -> openai.Stream[ChatCompletionChunk]:
    chunks: openai.Stream[ChatCompletionChunk]
    chunks = client.chat.completions.create(model=model, stream=True, **GREEDY | changes)
    return chunks


def streamed(client: openai.OpenAI, model: str, **changes: Any) -> list[ChatCompletionChunk]:
    return list(stream(client, model, **changes))


def text_of(chunks: Sequence[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_greedy_answer_is_what_generate_says(client: openai.OpenAI, model: str) -> None:
    ids, text = greedy(model)
    completion = ask(client, model)
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == model
    assert abs(completion.created - time.time()) < 60
    (choice,) = completion.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", text)
    assert choice.finish_reason == "length"
    usage = completion.usage
    assert usage is not None
    prompt = ChatTokenizer.from_dir(Path(model)).encode_prompt(ASKED)
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(ids))
    assert usage.total_tokens == len(prompt) + len(ids)


def test_a_streamed_answer_is_the_same_in_pieces(client: openai.OpenAI, model: str) -> None:
    whole = ask(client, model)
    chunks = streamed(client, model)
    assert text_of(chunks) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    with_usage = streamed(client, model, stream_options={"include_usage": True})
    assert [chunk.choices for chunk in with_usage[:-1]] == [chunk.choices for chunk in chunks]
    assert (with_usage[-1].choices, with_usage[-1].usage) == ([], whole.usage)


def test_a_bug_in_the_middle_of_a_stream_is_an_error_that_the_client_raises(
    client: openai.OpenAI, model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = iter([Piece("The", 1)])

    def broken(*_: object) -> list[Piece]:
        for piece in pieces:
            return [piece]
        raise ZeroDivisionError("in the decoder")

    monkeypatch.setattr(ChatModel, "advance", broken)
    chunks = stream(client, model)
    with pytest.raises(openai.APIError, match="on our side") as caught:
        list(chunks)
    assert "decoder" not in str(caught.value)
    assert "in the decoder" in caplog.text


def test_a_stream_on_the_wire_is_server_sent_events_with_an_end(server: Server, model: str) -> None:
    body = {"model": model, "messages": ASKED, "stream": True, "max_tokens": 3}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = answer.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"stream": False}, timeout=WAIT_S).json()
    ChatCompletion.model_validate(whole)  # the client itself doesn't check what it gets
    for model_object in httpx.get(f"{server.url}/v1/models").json()["data"]:
        Model.model_validate(model_object)


def test_the_client_s_own_helpers_and_the_async_client_work(server: Server, client: openai.OpenAI, model: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=ASKED, max_tokens=2, temperature=0)
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].finish_reason == "length"
    _, text = greedy(model, max_new_tokens=8)
    end = text[-2:]  # the helper takes no answer that was cut at its length
    with client.chat.completions.stream(model=model, messages=ASKED, temperature=0, stop=end) as stream:
        stream.until_done()
        assembled = stream.get_final_completion().choices[0].message.content
    assert assembled == text[: text.index(end)]

    async def journey() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
            create = other.chat.completions.create
            one, two = await asyncio.gather(
                *(create(model=model, messages=ASKED, max_tokens=8, temperature=0) for _ in range(2))
            )
            assert one.choices == two.choices
            chunks = await create(model=model, messages=ASKED, max_tokens=8, temperature=0, stream=True)
            assert text_of([chunk async for chunk in chunks]) == one.choices[0].message.content == text

    asyncio.run(journey())


def test_an_answer_ends_where_the_model_ends_it(server: Server, client: openai.OpenAI, model: str) -> None:
    ids, _ = greedy(model)
    at = next(i for i, token in enumerate(ids) if i > 2 and token not in ids[:i])
    ending = server.parts.settings.storage / "ending"
    shutil.copytree(model, ending)
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[at]]}))
    completion = ask(client, str(ending))
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content == ChatTokenizer.from_dir(Path(model)).decode(ids[:at])
    assert completion.usage is not None
    assert completion.usage.completion_tokens == at


@pytest.mark.parametrize("kind", ["one", "several"])
def test_an_answer_ends_before_a_stop_text_and_no_part_of_it_is_ever_sent(
    client: openai.OpenAI, model: str, kind: str
) -> None:
    _, text = greedy(model)
    word = text[7:11]  # over the borders of tokens
    at = text.index(word)
    stop = word if kind == "one" else ["not in there", word, text[at + 1 : at + 9]]
    completion = ask(client, model, stop=stop)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content == text[:at]
    chunks = streamed(client, model, stop=stop)
    assert text_of(chunks) == text[:at]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_only_began_like_a_stop_text_is_sent_in_the_end(client: openai.OpenAI, model: str) -> None:
    _, text = greedy(model)
    assert ask(client, model, stop=[text[-3:] + "?"]).choices[0].message.content == text


def test_the_same_seed_gives_the_same_answer_and_another_one_another(client: openai.OpenAI, model: str) -> None:
    def drawn(seed: int | None) -> str | None:
        return ask(client, model, temperature=1.5, seed=seed).choices[0].message.content

    assert drawn(7) == drawn(7)
    assert len({drawn(seed) for seed in range(4)}) == 4
    assert drawn(None) != drawn(None)
    assert ask(client, model, temperature=2, top_p=0).choices == ask(client, model).choices


def test_an_answer_can_be_sent_back_as_a_message(client: openai.OpenAI, model: str) -> None:
    first = ask(client, model, max_completion_tokens=6).choices[0].message
    dialog: list[Any] = [*ASKED, first, {"role": "user", "content": [{"type": "text", "text": "And"}]}]
    second = ask(client, model, messages=dialog).choices[0].message.content
    said = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And"}]
    assert second == greedy(model, said)[1]
    dialog[2] = {"role": "assistant", "content": first.content, "annotations": [], "tool_calls": [], "audio": None}
    assert ask(client, model, messages=dialog).choices[0].message.content == second  # as OpenAI's own answers have it
    developer = [{"role": "developer", "content": "Answer."}, ASKED[1]]
    assert ask(client, model, messages=developer).choices == ask(client, model).choices


def test_a_question_waits_for_no_longer_one(client: openai.OpenAI, model: str, endless: str) -> None:
    with client.chat.completions.create(model=endless, messages=ASKED, temperature=0, stream=True) as stream:
        next(iter(stream))
        ask(client, model, max_completion_tokens=2)  # a time-out otherwise
        assert client.models.list().data  # nor does anything else wait


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_goes_away(
    server: Server, endless: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(connected(server), endless, max_completion_tokens=1)
    loaded, engine = server.parts.models[endless], server.parts.answers
    assert isinstance(engine, TorchtuneEngine)
    pieces: list[Piece | UserError] = []
    original = loaded.advance

    def watched(answers: Sequence[Answering]) -> list[Piece | UserError]:
        found = original(answers)
        pieces.extend(found)
        return found

    monkeypatch.setattr(loaded, "advance", watched)
    body = {"model": endless, "messages": ASKED, "stream": stream, "temperature": 0}
    with httpx.Client() as http:
        request = http.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
        _ask_for_a_moment(http, request, lambda: len(pieces) > 3)
    eventually(lambda: not engine.busy, WAIT_S, lambda: "the answer is still being made")
    assert 3 < len(pieces) < 100_000
    count = len(pieces)
    ask(connected(server), endless, max_completion_tokens=1)  # the thread is free, and nothing was added meanwhile
    assert len(pieces) == count + 1


@pytest.mark.parametrize("fails", [False, True])
def test_several_answers_are_made_together(
    server: Server, model: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one token more for each in a step, and each the same as alone; also where only one at a time succeeds."""
    ask(connected(server), model, max_completion_tokens=1)
    loaded = server.parts.models[model]
    together: list[int] = []
    original = loaded.advance

    def watched(answers: Sequence[Answering]) -> list[Piece | UserError]:
        together.append(len(answers))
        if fails and len(answers) > 1:
            raise MemoryError("for all of them")
        return original(answers)

    questions = [[{"role": "user", "content": word * number}] for number, word in enumerate(("a ", "sea ", "b "), 1)]
    monkeypatch.setattr(loaded, "advance", watched)
    with ThreadPoolExecutor(len(questions)) as threads:
        asking = partial(ask, connected(server), model, max_completion_tokens=200)
        answers = list(threads.map(lambda messages: asking(messages=messages), questions))
    assert max(together) == len(questions)
    for messages, answer in zip(questions, answers, strict=True):
        assert answer.choices[0].message.content == greedy(model, messages, 200)[1]


def test_a_model_goes_on_loading_when_who_asked_goes_away(model: str) -> None:
    async def journey() -> None:
        started, go, loaded = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def load(name: str) -> ChatModel:
            started.set()
            await go.wait()
            found = await asyncio.to_thread(ChatModel.load, Path(name))
            loaded.set()
            return found

        engine = TorchtuneEngine(load)
        asking = asyncio.create_task(_all(engine.answer(Question(model, tuple(ASKED), 1))))
        await asyncio.wait_for(started.wait(), WAIT_S)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        go.set()
        await asyncio.wait_for(loaded.wait(), WAIT_S)

    asyncio.run(journey())


async def _all(parts: AsyncIterator[Part]) -> list[Part]:
    return [part async for part in parts]


def _ask_for_a_moment(http: httpx.Client, request: httpx.Request, enough: Callable[[], bool]) -> None:
    """Sends the request and goes away once there is `enough`."""
    timeout = {"timeout": {"connect": 5.0, "read": 0.5, "write": 5.0, "pool": 5.0}}
    request.extensions = timeout
    try:
        answer = http.send(request, stream=True)
        for _ in answer.iter_lines():
            if enough():
                break
        answer.close()
    except httpx.ReadTimeout:
        assert enough()


def test_a_tuned_model_and_its_checkpoints_answer_under_every_name_they_have(
    server: Server, client: openai.OpenAI, model: str
) -> None:
    job_id = server.submit(model=model)
    directories = server.train(job_id, 10, 20, 30)
    for step, directory in directories.items():
        make_tiny_model(directory / "merged", seed=step)
    checkpoints = {point.step_number: point for point in client.fine_tuning.jobs.checkpoints.list(job_id)}
    expected = {step: greedy(str(path / "merged"))[1] for step, path in directories.items()}
    assert len(set(expected.values())) == 3
    for step, point in checkpoints.items():
        for name in (point.id, point.fine_tuned_model_checkpoint):
            assert ask(client, name).choices[0].message.content == expected[step]
            assert client.models.retrieve(name).id == name
    last = checkpoints[30].fine_tuned_model_checkpoint
    tuned = last.removesuffix(":ckpt-step-30")
    with pytest.raises(openai.ConflictError, match="once the job has succeeded") as refused:
        ask(client, tuned)
    assert refused.value.code == "job_not_succeeded"
    assert last in refused.value.message

    server.append(job_id, CheckpointsDeleted(attempt=1, uris=[directories[10].as_uri()]), JobSucceeded())
    assert client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model == tuned
    assert ask(client, tuned).choices[0].message.content == expected[30]
    listed = [each.id for each in client.models.list()]
    assert listed[:3] == [tuned, last, checkpoints[20].fine_tuned_model_checkpoint]
    for name in (checkpoints[10].id, checkpoints[10].fine_tuned_model_checkpoint):
        with pytest.raises(openai.NotFoundError, match="deleted") as deleted:
            ask(client, name)
        assert deleted.value.code == "checkpoint_deleted"
    with pytest.raises(openai.NotFoundError, match="no checkpoint of step 11") as never:
        ask(client, f"{tuned}:ckpt-step-11")
    assert never.value.code == "model_not_found"
    shutil.rmtree(directories[20])
    with pytest.raises(openai.NotFoundError, match="no longer in the storage") as gone:
        ask(client, checkpoints[20].id)
    assert gone.value.code == "checkpoint_deleted"


@pytest.mark.parametrize(
    "name",
    ["gpt-4o", "ft:tiny:tunewright::01ARZ3NDEKTSV4RRFFQ69G5FAV", "ftckpt_01ARZ3NDEKTSV4RRFFQ69G5FAV-3", "/etc", "./x",
     "ft:x", "ftckpt_", "s3://u:p@bucket/x", "file://elsewhere/x", "\U0001f600"],
)  # fmt: skip
def test_an_unknown_model_is_a_404_that_is_not_tried_again(client: openai.OpenAI, name: str) -> None:
    for call in (lambda: ask(client, name), lambda: streamed(client, name)):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refused.value.param == "model"
        assert refused.value.request.headers["x-stainless-retry-count"] == "0"


def test_a_directory_without_weights_is_refused_with_what_it_lacks(server: Server, client: openai.OpenAI) -> None:
    broken = make_tiny_model(server.parts.settings.storage / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(openai.BadRequestError, match=r"model\.safetensors") as refused:
        ask(client, str(broken))
    assert (refused.value.code, refused.value.param) == ("model_incomplete", "model")


@pytest.mark.parametrize("changes", [{"max_tokens": 510}, {"messages": [{"role": "user", "content": "word " * 900}]}])
def test_what_the_context_has_no_room_for_is_refused(
    client: openai.OpenAI, model: str, changes: dict[str, Any]
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context is 512 tokens") as refused:
            ask(client, model, **{"max_completion_tokens": openai.omit, "stream": stream, **changes})
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_an_answer_without_a_limit_ends_with_the_context(client: openai.OpenAI, model: str) -> None:
    completion = ask(client, model, max_completion_tokens=openai.omit)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 512


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"n": 2}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": 1 << 63}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
    ],
)  # fmt: skip
def test_unsupported_and_invalid_fields_are_refused_by_name(
    client: openai.OpenAI, model: str, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, model, **changes)
    assert refused.value.param == param


@pytest.mark.parametrize("stop", [3, [""], [["a"]], "s" * 1001, ["a"] * 5])
def test_a_wrong_stop_is_one_problem(server: Server, model: str, stop: Any) -> None:
    body = {"model": model, "messages": ASKED, "stop": stop}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    (problem,) = answer.json()["error"]["errors"]
    assert (answer.status_code, problem["param"].partition(".")[0]) == (400, "stop")
    assert "constrained" not in answer.text


def test_every_field_of_openai_s_request_is_taken_or_refused_by_name(client: openai.OpenAI, model: str) -> None:
    """What the client's own type lists, with a value that asks for something; and with null, which never does."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    fields = CompletionCreateParamsBase.__annotations__.keys() - {"messages", "model"}
    assert len(fields) > 30
    for field in fields:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=model, messages=ASKED, extra_body={field: {"no": {"such": "value"}}})
        assert refused.value.param == field or str(refused.value.param).startswith(f"{field}."), field
    nulls = dict.fromkeys(fields)
    asked = {"temperature": 0, "max_completion_tokens": 24}
    answer = client.chat.completions.create(model=model, messages=ASKED, extra_body=nulls | asked)
    assert answer.choices == ask(client, model).choices
    neutral = {"n": 1, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "store": False, "user": "u"}
    assert ask(client, model, **neutral).choices == answer.choices


def test_a_model_that_memory_has_no_room_for_is_refused_before_it_takes_any(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make_tiny_model(server.parts.settings.storage / "half")  # in bf16, so that it can't be mapped as it is
    tensors = {name: value.bfloat16() for name, value in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(chat_model, "FITS", 1e-9)
    with pytest.raises(openai.InternalServerError, match="GB in memory") as refused:
        ask(client.with_options(max_retries=0), str(half))
    assert (refused.value.status_code, refused.value.code) == (503, "no_room")
    assert refused.value.response.headers["retry-after"]
    monkeypatch.undo()
    assert ask(client, str(half)).choices[0].message.content == greedy(str(half))[1]


def test_a_dialog_that_memory_has_no_room_for_is_refused_and_the_next_one_is_answered(
    server: Server, client: openai.OpenAI, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ask(client, model)

    def short(_: object) -> list[Piece | UserError]:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(server.parts.models[model], "advance", short)
    with pytest.raises(openai.InternalServerError, match="not enough memory") as refused:
        ask(client.with_options(max_retries=0), model)
    assert (refused.value.status_code, refused.value.code) == (503, "no_room")
    monkeypatch.undo()
    assert ask(client, model).choices == answer.choices


def test_a_model_whose_weights_are_broken_says_so(server: Server, client: openai.OpenAI) -> None:
    broken = make_tiny_model(server.parts.settings.storage / "nan")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, str(broken))
    assert refused.value.code == "model_broken"
    with pytest.raises(openai.APIError, match="not a number"):  # in mid-stream
        streamed(client, str(broken))
