"""Estimates: in a process of their own, with limits, and for a large file from a sample."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from events.config import Config
from tests.full_disk import full_disk
from tests.small_hub import small_hub
from tests.tiny_models import make_tiny_model
from tests.trainers.data.templates import QWQ
from trainers import estimate
from trainers.data.chat import ChatTokenizer
from trainers.data.prepare import NO_END
from trainers.errors import ConfigProblems, InfrastructureError
from trainers.estimate import Asked, Estimator, answer, read_sample
from trainers.models import smollm2
from trainers.planning.plan import Plan, make_plan
from trainers.settings import Settings

ROWS = 4000


def row(number: int) -> str:
    said = "the sea " * (1 + number * 20 // ROWS)
    return json.dumps({"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    make_tiny_model(tmp_path / "tiny")
    (tmp_path / "rows.jsonl").write_text("".join(f"{row(number)}\n" for number in range(ROWS)))
    return Settings(storage=tmp_path / "storage", data_roots=(tmp_path,), model_roots=(tmp_path,))


def plan(settings: Settings, **changes: Any) -> Plan:
    root = settings.data_roots[0]
    return make_plan(Config.model_validate({"model": str(root / "tiny"), "data": str(root / "rows.jsonl"), **changes}))


def test_the_process_gives_the_same_answer_as_this_one(settings: Settings) -> None:
    asked = plan(settings)
    found = asyncio.run(Estimator(settings).find(Asked(plan=asked, device="cpu", worker_bytes=1 << 30)))
    assert found == answer(Asked(plan=asked, device="cpu", worker_bytes=1 << 30), settings).found
    assert found.data.rows == ROWS


def test_the_process_passes_on_what_is_wrong(settings: Settings) -> None:
    (settings.data_roots[0] / "rows.jsonl").write_text("nope\n")
    with pytest.raises(ConfigProblems, match="line 1: the line is not JSON"):
        asyncio.run(Estimator(settings).find(Asked(plan=plan(settings), device="cpu")))


def test_the_warnings_are_those_of_the_job_s_log(settings: Settings) -> None:
    root = settings.data_roots[0]
    template = root / "tiny" / "chat_template.jinja"
    asked = Asked(plan=plan(settings, validation_data=str(root / "valid.jsonl")), device="cpu")
    (root / "valid.jsonl").write_text(f"{row(0)}\n")
    template.write_text(QWQ)
    found = answer(asked, settings).found
    assert found is not None
    assert [warning.partition(" an answer")[0] for warning in found.warnings] == [
        f"{root}/rows.jsonl: in {ROWS:,} of {ROWS:,} rows",
        f"{root}/valid.jsonl: in 1 of 1 rows",
    ]
    template.write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}")
    found = answer(asked, settings).found
    assert found is not None
    assert found.warnings == [NO_END]


@pytest.mark.parametrize(
    ("context", "asked", "told"),
    [
        (
            5000,
            None,
            ["1 of 1 rows are cut off at 4,096 tokens; set extras.max_seq_len to keep up to 5,000 tokens of each"],
        ),
        (20, 40, ["1 of 1 rows are cut off at 20 tokens, which is all the model takes, though max_seq_len is 40"]),
        (20, 20, []),
        (20, None, []),
        (5000, 9000, []),
    ],
)
def test_there_is_a_warning_about_truncated_rows_unless_it_was_asked_for(
    settings: Settings, context: int, asked: int | None, told: list[str]
) -> None:
    root = settings.data_roots[0]
    make_tiny_model(root / "tiny", max_position_embeddings=context)
    said = "the sea " * (3000 if context > 4096 and asked is None else 20)
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    (root / "rows.jsonl").write_text(json.dumps({"dialog": dialog}))
    extras = {"max_seq_len": asked} if asked else {}
    found = answer(Asked(plan=plan(settings, fine_tuning_options={"extras": extras}), device="cpu"), settings).found
    assert found is not None
    assert found.warnings == [f"{root}/rows.jsonl: {warning}" for warning in told]


def test_an_estimate_that_takes_too_long_is_given_up(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "LIMIT_S", 0.01)
    with pytest.raises(InfrastructureError) as caught:
        asyncio.run(Estimator(settings).find(Asked(plan=plan(settings), device="cpu")))
    assert caught.value.error.code == "estimate_failed"


def test_only_so_many_estimates_wait(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "WAITING", 1)
    running = 0

    class Held(Estimator):
        async def _run(self, asked: Asked) -> estimate.Answer:
            nonlocal running
            running += 1
            assert running <= estimate.AT_A_TIME
            await asyncio.sleep(0.01)
            running -= 1
            return estimate.Answer(problems=[(None, "no", "no")])

    async def crowd() -> list[str]:
        estimator = Held(settings)
        calls = [estimator.find(Asked(plan=plan(settings), device="cpu")) for _ in range(5)]
        return [type(end).__name__ for end in await asyncio.gather(*calls, return_exceptions=True)]

    assert sorted(asyncio.run(crowd())) == ["ConfigProblems"] * 3 + ["InfrastructureError"] * 2


def test_a_sample_of_a_large_file_tells_nearly_what_the_whole_tells(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ChatTokenizer.from_dir(settings.model_roots[0] / "tiny")
    uri = (settings.data_roots[0] / "rows.jsonl").as_uri()
    whole = read_sample(uri, tokenizer, 512, pairs=False).counted()
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 100_000)
    some = read_sample(uri, tokenizer, 512, pairs=False).counted()
    assert (whole.sampled, some.sampled) == (False, True)
    assert some.rows_seen < ROWS / 4
    assert some.rows == whole.rows  # all lines were counted
    assert some.tokens == pytest.approx(whole.tokens, rel=0.1)
    assert some == read_sample(uri, tokenizer, 512, pairs=False).counted()


def test_if_reading_takes_too_long_counts_are_extrapolated(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ChatTokenizer.from_dir(settings.model_roots[0] / "tiny")
    uri = (settings.data_roots[0] / "rows.jsonl").as_uri()
    ticks = iter(range(10_000))
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 100)
    monkeypatch.setattr(estimate, "time", clock)  # its own: event loops of other threads live by the real one
    found = read_sample(uri, tokenizer, 512, pairs=False).counted()
    assert found.sampled
    assert found.rows_seen == pytest.approx(100 * estimate.READ_S, abs=5)
    assert ROWS / 2 < found.rows < 2 * ROWS


def test_the_weights_of_a_hub_model_are_not_downloaded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_hub() as hub:
        hub.add("someone/tiny", settings.model_roots[0] / "tiny")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        asked = plan(settings).model_copy(update={"model": "someone/tiny"})
        found = answer(Asked(plan=asked, device="cpu"), settings)
        assert found.found is not None
        assert found.found.memory == answer(Asked(plan=plan(settings), device="cpu"), settings).result().memory
        assert not any(name.endswith(".safetensors") for name in hub.downloads())


def test_a_full_disk_is_reported_as_an_infrastructure_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model's, which is converted into the cache."""
    monkeypatch.setattr(smollm2, "convert", lambda _, out: (out / "config.json").write_text(100 * " "))
    asked = plan(settings).model_copy(update={"model": "smollm2-135m-instruct"})
    with full_disk():
        error = answer(Asked(plan=asked, device="cpu"), settings).error
    assert error is not None
    assert (error.code, error.fault) == ("storage_full", "infrastructure")


def test_activations_are_not_recomputed_if_a_worker_has_memory_for_them(settings: Settings) -> None:
    asked = plan(settings).model_copy(update={"method": "full", "lora": None, "enable_activation_checkpointing": True})
    again, kept = (
        answer(Asked(plan=asked, device="cpu", share_bytes=share), settings).result() for share in (None, 1 << 30)
    )
    assert kept.memory.activations > again.memory.activations
    assert kept.flops_per_token == again.flops_per_token * 6 / 8


def test_rows_with_tokens_that_the_model_has_no_embedding_of_are_refused(settings: Settings) -> None:
    file = settings.model_roots[0] / "tiny" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["the sea"])
    tokenizer.save(str(file))
    problems = answer(Asked(plan=plan(settings), device="cpu"), settings).problems
    assert problems
    assert all("the token 'the sea' (" in message or message.startswith("and ") for _, message, _ in problems)


def test_the_text_of_tokens_joins_to_the_text_of_all(settings: Settings) -> None:
    tokenizer = ChatTokenizer.from_dir(settings.model_roots[0] / "tiny")
    text = "née ☂ the 海 sea"
    ids = tokenizer.encode_prompt([{"role": "user", "content": text}])
    texts = tokenizer.texts(ids)
    assert "".join(texts) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert "" in texts  # the bytes of a character that takes several tokens
