"""Events as text: what was written reads back the same, by this version, older and newer ones."""

import json
from typing import Any

import pytest
from hypothesis import given

from events import codec
from events.codec import CorruptEventError, UnknownEvent, decode, encode
from events.facts import Event, JobError, JobFailed, MetricsRecorded, RunStarted
from tests.events.any_event import events
from tests.events.facts_of_a_job import SUCCEEDED, started


@given(events)
def test_every_event_round_trips_to_the_bit(event: Event) -> None:
    body = encode(event)
    back = decode(body)
    assert type(back) is type(event)
    assert repr(back) == repr(event)  # repr: NaN equals itself, 0.0 is not -0.0
    assert encode(back) == body


@given(events)
def test_an_encoded_event_is_one_line_of_plain_json_in_utf_8(event: Event) -> None:
    body = encode(event)
    json.loads(body.encode(), parse_constant=pytest.fail)
    assert "\n" not in body


@pytest.mark.parametrize(
    "body",
    [
        '{"type":"JobPaused","v":1,"until":null}',
        '{"v": 9, "type": "RunStarted",  "nodes": 1}',
        '{"v":1,"type":"RunStarted","nodes":"many"}',
    ],
)
def test_what_this_version_can_not_understand_is_kept_to_the_letter(body: str) -> None:
    event = decode(body)
    assert isinstance(event, UnknownEvent)
    assert encode(event) == body


def test_metrics_of_a_version_without_rewards_read_back() -> None:
    step = '{"step":1,"epoch":1,"time":"2026-11-22T20:00:00Z","loss":0.5}'
    event = decode(f'{{"v":1,"type":"MetricsRecorded","attempt":1,"steps":[{step}]}}')
    assert isinstance(event, MetricsRecorded)
    assert (event.steps[0].loss, event.steps[0].rewards_margin) == (0.5, None)


def test_a_failure_of_a_version_without_a_diagnosis_reads_back() -> None:
    error = '{"code":"out_of_memory","message":"m","param":null,"fault":"user"}'
    event = decode(f'{{"v":1,"type":"JobFailed","attempt":1,"error":{error},"error_path":null}}')
    assert isinstance(event, JobFailed)
    assert (event.error.fault, event.error.retryable, event.error.suggestion) == ("user", None, None)


def test_a_field_that_a_newer_version_added_is_left_out() -> None:
    assert decode('{"v":1,"type":"JobSucceeded","applause":true}') == SUCCEEDED


def test_an_older_version_goes_through_every_upcaster_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_node(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "nodes": 1}

    def gpu_is_the_device(fields: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in fields.items() if name != "gpu"}, "device": fields["gpu"]}

    monkeypatch.setitem(codec.UPCASTERS, ("RunStarted", -1), one_node)
    monkeypatch.setitem(codec.UPCASTERS, ("RunStarted", 0), gpu_is_the_device)
    today = started(1)
    oldest = {**today.model_dump(exclude={"nodes", "device"}), "v": -1, "gpu": "cpu"}
    assert decode(json.dumps(oldest)) == RunStarted.model_validate(today.model_dump())


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"v":1}', '{"v":1,"type":["JobSucceeded"]}'])
def test_what_never_was_an_event_is_corrupt(body: str) -> None:
    with pytest.raises(CorruptEventError):
        decode(body)


def test_recording_a_failure_does_not_fail_because_of_its_message() -> None:
    error = JobError(code="x", message="no such file: \udce4.jsonl", fault="user")
    assert error.message == "no such file: ?.jsonl"
