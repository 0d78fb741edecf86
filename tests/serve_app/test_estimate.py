"""POST /fine_tuning/jobs/estimate: its answer agrees with what the job then does."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from events.config import Config
from events.facts import DataReport, DataValidated, Event, MetricsRecorded, Resources, StepMetrics
from tests.events.facts_of_a_job import ADMITTED, REPORT, started
from tests.serve_app.live_server import Parts, Serve, Server
from tests.tiny_models import make_tiny_model
from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import TokenisedDataset
from trainers.data.prepare import prepare
from trainers.data.rows import parse_row
from trainers.estimate import AT_A_TIME, WAITING, Asked, Estimator, Found
from trainers.models.architecture import inspect_model_dir
from trainers.models.layout import numbers_of
from trainers.planning.plan import Plan, make_plan
from trainers.training.batches import Progress
from trainers.training.load import build_schedule

MAX_SEQ_LEN = 64
WORDS = "the children read a story about the sea "


def row(length: int, **more: Any) -> str:
    dialog = [{"role": "user", "content": f"Tell me {length} words, née ☂."}, {"role": "assistant", "content": WORDS}]
    dialog[1]["content"] *= length
    return json.dumps({"dialog": dialog, **more})


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    return serve()


@pytest.fixture(scope="module")
def http(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=120)


@pytest.fixture(scope="module")
def storage(server: Server) -> Path:
    storage = server.parts.settings.storage
    make_tiny_model(storage / "tiny")
    (storage / "train.jsonl").write_text("\n".join(row(1 + number % 12) for number in range(21)) + "\n")
    (storage / "valid.jsonl").write_text(row(2) + "\n")
    (storage / "bad.jsonl").write_text(f"{row(1)}\n\nnope\n{row(2)}\n[]\n")
    return storage


@pytest.fixture
def config(storage: Path) -> dict[str, Any]:
    return {
        "model": str(storage / "tiny"),
        "data": str(storage / "train.jsonl"),
        "validation_data": str(storage / "valid.jsonl"),
        "fine_tuning_options": {"n_epochs": 3, "batch_size": 2, "extras": {"max_seq_len": MAX_SEQ_LEN}},
    }


def estimate(http: httpx.Client, config: dict[str, Any]) -> dict[str, Any]:
    answer = http.post("/fine_tuning/jobs/estimate", json=config)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def validated(config: dict[str, Any], out: Path, *, pairs: bool = False) -> DataReport:
    """What the job's own validation makes of its data, in `out`."""
    return prepare(
        Path(config["data"]).as_uri(),
        ChatTokenizer.from_dir(Path(config["model"])),
        max_seq_len=MAX_SEQ_LEN,
        pairs=pairs,
        out_dir=out,
        cache=DataCache(out.with_name("cache"), 1 << 30),
        max_invalid_fraction=0.9,
        progress=print,
    )


def test_the_counts_are_those_of_the_jobs_own_validation(
    http: httpx.Client, config: dict[str, Any], tmp_path: Path
) -> None:
    found = estimate(http, config)
    report = validated(config, tmp_path / "train")
    assert report.truncated_rows
    for name in ("rows", "invalid_rows", "tokens", "trained_tokens", "truncated_rows", "max_seq_len"):
        assert found["data"][name] == getattr(report, name)
    assert found["data"]["sampled"] is False
    assert found["validation_data"]["rows"] == 1
    plan = make_plan(Config.model_validate(config))
    rows = TokenisedDataset(tmp_path / "train")
    assert found["steps"] == sum(1 for _ in build_schedule(plan, rows, 0, 1).steps(Progress()))


def test_a_warm_up_as_long_as_the_run_is_warned_of(http: httpx.Client, config: dict[str, Any]) -> None:
    assert estimate(http, config)["warnings"] == []
    config["fine_tuning_options"]["extras"]["lr_scheduler.num_warmup_steps"] = 100_000
    (warning,) = estimate(http, config)["warnings"]
    assert "the learning rate never reaches lr" in warning


def test_the_preview_is_what_is_trained_on_token_by_token(
    http: httpx.Client, config: dict[str, Any], tmp_path: Path
) -> None:
    found = estimate(http, config)
    validated(config, tmp_path / "train")
    rows = TokenisedDataset(tmp_path / "train")
    assert [shown["line"] for shown in found["preview"]] == [1, 2, 3]
    for number, shown in enumerate(found["preview"]):
        ids, trained = rows[number]
        assert [token["id"] for token in shown["tokens"]] == ids.tolist()
        assert [token["trained"] for token in shown["tokens"]] == trained.tolist()
        assert shown["n_tokens"] == len(ids)
    text = "".join(token["text"] for token in found["preview"][0]["tokens"])
    assert text == f"<|im_start|>user\nTell me 1 words, née ☂.<|im_end|>\n<|im_start|>assistant\n{WORDS}<|im_end|>\n"
    said = "".join(token["text"] for token in found["preview"][0]["tokens"] if token["trained"])
    assert said == f"{WORDS}<|im_end|>"


def test_truncated_rows_are_named_by_their_lines(http: httpx.Client, config: dict[str, Any]) -> None:
    tokenizer = ChatTokenizer.from_dir(Path(config["model"]))
    lines = Path(config["data"]).read_bytes().splitlines()
    long = [len(tokenizer.encode([parse_row(line)])[0][0]) > MAX_SEQ_LEN for line in lines]
    found = estimate(http, config)["data"]
    assert found["truncated_lines"] == [number for number, cut in enumerate(long, 1) if cut]
    assert found["truncated_rows"] == sum(long) > 0
    assert found["longest_row"] == MAX_SEQ_LEN


def test_of_preferences_both_sides_are_shown(http: httpx.Client, config: dict[str, Any], storage: Path) -> None:
    pair = {
        "dialog": [{"role": "user", "content": "Where is the sea?"}],
        "chosen": {"role": "assistant", "content": "Over there."},
        "rejected": {"role": "assistant", "content": "No."},
    }
    (storage / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n")
    options = {"extras": {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}}
    asked = {"model": config["model"], "data": str(storage / "pairs.jsonl"), "fine_tuning_options": options}
    found = estimate(http, asked)
    assert [(shown["line"], shown["side"]) for shown in found["preview"]] == [(1, "chosen"), (1, "rejected")]
    assert found["data"]["rows"] == 1


def test_nothing_is_recorded(http: httpx.Client, config: dict[str, Any]) -> None:
    before = http.get("/fine_tuning/jobs").json()
    estimate(http, config)
    assert http.get("/fine_tuning/jobs").json() == before


def test_bad_rows_of_both_files_are_named_by_their_lines(
    http: httpx.Client, config: dict[str, Any], storage: Path
) -> None:
    bad = str(storage / "bad.jsonl")
    answer = http.post("/fine_tuning/jobs/estimate", json=config | {"data": bad, "validation_data": bad})
    assert answer.status_code == 422
    error = answer.json()["error"]
    told = [(problem["param"], problem["message"].partition(":")[0], problem["code"]) for problem in error["errors"]]
    expected = [(param, f"line {line}", "invalid_data") for param in ("data", "validation_data") for line in (3, 5)]
    assert told == expected


def test_bad_rows_that_the_job_would_skip_are_counted(
    http: httpx.Client, config: dict[str, Any], storage: Path
) -> None:
    options = {"extras": {"max_invalid_fraction": 0.5}}
    found = estimate(http, config | {"data": str(storage / "bad.jsonl"), "fine_tuning_options": options})
    assert (found["data"]["rows"], found["data"]["invalid_rows"]) == (2, 2)
    assert [shown["line"] for shown in found["preview"]] == [1, 4]


def test_a_bad_request_gets_the_answer_that_submitting_it_would_get(http: httpx.Client, storage: Path) -> None:
    bad = {
        "model": str(storage / "nowhere"),
        "data": str(storage / "none.jsonl"),
        "fine_tuning_options": {"n_epochs": 0},
        "overrides": "--nproc_per_node 100",
        "colour": "red",
    }
    answers = [http.post(f"/fine_tuning/jobs/{what}", json=bad) for what in ("estimate", "submit")]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert answers[0].json() == answers[1].json()
    assert len(answers[0].json()["error"]["errors"]) > 3


def test_a_model_that_the_settings_do_not_suit_is_refused(http: httpx.Client, config: dict[str, Any]) -> None:
    custom = {"finetuning_type": "lora", "apply_lora_to_output": True}
    answer = http.post(
        "/fine_tuning/jobs/estimate", json=config | {"fine_tuning_options": {"custom_training_options": custom}}
    )
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "unsupported_for_model"


def test_a_tuned_model_is_estimated_by_the_names_it_is_trained_by(
    server: Server, http: httpx.Client, config: dict[str, Any]
) -> None:
    job_id = server.submit()
    (directory,) = server.train(job_id, 3).values()
    make_tiny_model(directory)
    (checkpoint,) = http.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]
    expected = estimate(http, config | {"model": str(directory)})
    for name in (checkpoint["id"], checkpoint["fine_tuned_model_checkpoint"]):
        assert estimate(http, config | {"model": name}) == expected
    model = checkpoint["fine_tuned_model_checkpoint"].removesuffix(":ckpt-step-3")
    answer = http.post("/fine_tuning/jobs/estimate", json=config | {"model": model})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_succeeded")


def test_the_parts_of_the_memory_add_up_and_are_held_against_what_there_is(
    http: httpx.Client, config: dict[str, Any]
) -> None:
    memory = estimate(http, config)["memory"]
    names = ("weights", "optimizer", "gradients", "activations", "output_head", "checkpoint", "overhead")
    assert memory["peak_bytes"] == sum(memory[name] for name in names)
    assert (memory["available_bytes"], memory["fits"]) == (Parts.worker_bytes, True)


class _TinyNodes(Parts):
    worker_bytes = 600_000


def test_a_job_whose_weights_and_optimizer_fit_no_node_is_refused_at_once(serve: Serve) -> None:
    server = serve(_TinyNodes)
    storage = server.parts.settings.storage
    model = make_tiny_model(storage / "tiny")
    full = {"custom_training_options": {"finetuning_type": "full"}, "extras": {"dtype": "fp32"}}
    config = {"model": str(model), "data": str(storage / "rows.jsonl"), "fine_tuning_options": full}
    answer = httpx.post(f"{server.url}/fine_tuning/jobs/submit", json=config)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("does_not_fit", "fine_tuning_options")


def past(tokens_per_second: float, device: str = "cpu", steps: int = 5) -> list[Event]:
    """A run whose steps of 2 rows of 50 tokens came at that speed, the first one ten times slower."""
    report = REPORT.model_copy(update={"tokens": 500, "trained_tokens": 100, "max_seq_len": MAX_SEQ_LEN})
    took = timedelta(seconds=100 / tokens_per_second)
    began = datetime.now(UTC) + timedelta(seconds=30)
    ends = [began + took * (10 + number) for number in range(steps)]
    measured = [StepMetrics(step=number, epoch=1, time=end.isoformat(), loss=1.0) for number, end in enumerate(ends, 1)]
    run = started(1, device=device, total_steps=steps, n_epochs=1)
    return [DataValidated(data=report), ADMITTED, run, MetricsRecorded(attempt=1, steps=measured)]


class _Busy(Parts):
    """A service where as many estimates run and wait as are allowed."""

    async def estimate(self, plan: Plan, resources: Resources) -> Found:
        estimator = Estimator(self.settings)
        estimator._here = AT_A_TIME + WAITING
        return await estimator.find(Asked(plan=plan, device="cpu"))


def test_an_estimate_that_is_one_too_many_is_told_when_to_try_again(serve: Serve) -> None:
    server = serve(_Busy)
    answer = httpx.post(f"{server.url}/fine_tuning/jobs/estimate", json=server.config())
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.json()["error"]["code"] == "too_many_estimates"
    assert "Retry-After" in answer.headers
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "429" in document["paths"]["/fine_tuning/jobs/estimate"]["post"]["responses"]


def test_the_time_is_measured_on_jobs_like_it_once_there_are_some(
    server: Server, http: httpx.Client, config: dict[str, Any]
) -> None:
    before = estimate(http, config)["time"]
    assert before["basis"].startswith("assumed: ")
    assert before["basis"].endswith("; no similar job has run here")
    other = config | {"fine_tuning_options": {**config["fine_tuning_options"], "extras": {"dtype": "bf16"}}}
    for asked, speed in ((config, 200.0), (config, 220.0), (config, 240.0), (other, 9999.0)):
        job_id = http.post("/fine_tuning/jobs/submit", json=asked | {"metadata": {"speed": speed}}).json()["job_id"]
        server.append(job_id, *past(speed))
    found = estimate(http, config)
    time = found["time"]
    assert time["basis"] == "measured on 3 jobs"
    # The clock of the log began the first step: it is left out, and the others are as said.
    assert time["tokens_per_second"] == pytest.approx(220, rel=0.01)
    assert time["seconds"] == pytest.approx(found["steps"] * 2 * found["data"]["tokens"] / 21 / 220, rel=0.1)


def test_the_time_of_a_packed_job_is_said_to_be_assumed_whatever_has_run_here(
    http: httpx.Client, config: dict[str, Any]
) -> None:
    packed = {"extras": {"packed": True, "max_seq_len": MAX_SEQ_LEN}}
    basis = estimate(http, config | {"fine_tuning_options": packed})["time"]["basis"]
    assert basis.startswith("assumed: ")
    assert basis.endswith("; the speed of packed jobs isn't measured")


@pytest.mark.parametrize(
    ("flags", "dtype", "operations"),
    [
        ("avx512_bf16", None, 1.5e11),
        ("avx512_bf16", "bf16", 1.5e11),
        ("avx512_bf16", "fp32", 6e10),
        ("avx2", None, 6e10),
        ("avx2", "bf16", 6e10),
    ],
)
def test_the_speed_that_is_assumed_of_a_cpu_depends_on_whether_it_computes_in_bf16(
    http: httpx.Client, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    flags: str, dtype: str | None, operations: float,
) -> None:  # fmt: skip
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("serve_app.pace.CPU_INFO", tmp_path / "cpuinfo")
    config["fine_tuning_options"]["custom_training_options"] = {"finetuning_type": "full"}
    config["fine_tuning_options"]["extras"]["enable_activation_checkpointing"] = False
    if dtype is not None:
        config["fine_tuning_options"]["extras"]["dtype"] = dtype
    found = estimate(http, config)["time"]
    in_bf16 = " (in bf16, as on the API's node)" if operations > 1e11 else ""
    speed = f"{operations:.2g} operations a second on each CPU"
    assert found["basis"] == f"assumed: {speed}{in_bf16}; no similar job has run here"
    weights = numbers_of(inspect_model_dir(Path(config["model"])))
    assert found["tokens_per_second"] == pytest.approx(operations / (6 * weights), rel=0.01)
