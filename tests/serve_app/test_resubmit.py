"""POST /fine_tuning/jobs/resubmit: a new job from a checkpoint of an old one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from events.facts import CheckpointSaved, CheckpointsDeleted, JobSucceeded
from tests.serve_app.live_server import MODEL, Server
from tests.tiny_models import make_tiny_model

RESUBMIT = "/fine_tuning/jobs/resubmit"
STATUS = "/fine_tuning/jobs/status"
OPTIONS = {
    "n_epochs": 2,
    "lr": 1e-4,
    "custom_training_options": {"finetuning_type": "lora", "lora_rank": 4},
    "extras": {"max_seq_len": 64},
}


class Earlier:
    """A job that has trained: an adapter's checkpoint at step 10, a whole model's at step 20."""

    def __init__(self, server: Server, job_id: str) -> None:
        self.server, self.job_id = server, job_id
        self.paths = server.train(job_id, 10, 20)
        make_tiny_model(self.paths[10] / "merged")
        (self.paths[10] / "adapter").mkdir()
        make_tiny_model(self.paths[20])

    def uri(self, step: int) -> str:
        return self.paths[step].as_uri()


@pytest.fixture
def earlier(server: Server, submit: Callable[..., str]) -> Earlier:
    return Earlier(server, submit(fine_tuning_options=OPTIONS, metadata={"team": "a", "run": 1}))


def again(http: httpx.Client, earlier: Earlier, **body: Any) -> dict[str, Any]:
    answer = http.post(RESUBMIT, json={"job_id": earlier.job_id, **body})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def problems(http: httpx.Client, earlier: Earlier, **body: Any) -> dict[str, str]:
    answer = http.post(RESUBMIT, json={"job_id": earlier.job_id, **body})
    assert answer.status_code == 422, answer.text
    return {problem["param"]: problem["code"] for problem in answer.json()["error"]["errors"]}


def test_the_new_job_has_the_old_config_and_the_last_checkpoint_as_its_model(
    http: httpx.Client, earlier: Earlier
) -> None:
    job = again(http, earlier)
    assert job["job_id"] != earlier.job_id
    assert job["status"] == "validation"
    old = http.get(STATUS, params={"job_id": earlier.job_id}).json()
    assert job["input_config"] == old["input_config"] | {"model": str(earlier.paths[20])}
    origin = {"job_id": earlier.job_id, "checkpoint": earlier.uri(20), "base_model": MODEL}
    assert job["resubmitted_from"] == origin
    assert "resubmitted_from" not in old
    assert http.get(STATUS, params={"job_id": job["job_id"]}).json() == job


def test_of_an_adapter_the_merged_model_is_taken(http: httpx.Client, earlier: Earlier) -> None:
    for checkpoint in (10, earlier.uri(10)):
        job = again(http, earlier, checkpoint=checkpoint)
        assert job["input_config"]["model"] == str(earlier.paths[10] / "merged")
        assert job["resubmitted_from"]["checkpoint"] == earlier.uri(10)


def test_the_base_model_stays_the_first_jobs_however_often_one_goes_on(
    http: httpx.Client, server: Server, earlier: Earlier
) -> None:
    second = Earlier(server, again(http, earlier)["job_id"])
    assert again(http, second, checkpoint=10)["resubmitted_from"]["base_model"] == MODEL


def test_changes_are_laid_over_the_old_config(http: httpx.Client, earlier: Earlier) -> None:
    changes = {
        "fine_tuning_options": {"lr": 1e-5, "custom_training_options": {"lora_alpha": 8}, "n_epochs": None},
        "metadata": {"run": 2},
        "overrides": "--nproc_per_node 2",
    }
    job = again(http, earlier, config=changes)
    assert job["input_config"]["fine_tuning_options"] == {
        "lr": 1e-5,
        "custom_training_options": {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8},
        "extras": {"max_seq_len": 64},
    }
    assert job["metadata"] == {"team": "a", "run": 2}
    assert job["resources"]["workers"] == 2


@pytest.mark.parametrize(
    ("old", "change", "field"),
    [
        ({"extras": {"optimizer": {"lr": 1e-4}}}, {"lr": 1e-5}, "lr"),
        (
            {"extras": {"lora_rank": 4}},
            {"custom_training_options": {"lora_rank": 8}},
            "custom_training_options.lora_rank",
        ),
    ],
)
def test_a_change_that_a_later_place_of_the_old_config_overrides_is_refused(
    http: httpx.Client,
    server: Server,
    submit: Callable[..., str],
    old: dict[str, Any],
    change: dict[str, Any],
    field: str,
) -> None:
    earlier = Earlier(server, submit(fine_tuning_options=OPTIONS | old))
    config: dict[str, Any] = {"fine_tuning_options": change}
    assert problems(http, earlier, config=config) == {f"config.fine_tuning_options.{field}": "duplicate_key"}
    config["fine_tuning_options"] = change | {"extras": old["extras"]}
    again(http, earlier, config=config)
    config["fine_tuning_options"] = change | {"extras": dict.fromkeys(old["extras"])}
    again(http, earlier, config=config)


@pytest.mark.parametrize("removed", [{"lr": None}, {"custom_training_options": {"lora_rank": None}}])
def test_an_option_that_a_later_place_overrides_can_be_removed(
    http: httpx.Client, server: Server, submit: Callable[..., str], removed: dict[str, Any]
) -> None:
    options = OPTIONS | {"extras": {"lora_rank": 4, "optimizer": {"lr": 1e-4}}}
    job = again(http, Earlier(server, submit(fine_tuning_options=options)), config={"fine_tuning_options": removed})
    left = job["input_config"]["fine_tuning_options"]
    assert left["extras"] == options["extras"]
    assert ("lr" in left, "lora_rank" in left["custom_training_options"]) == ("lr" not in removed, "lr" in removed)


def test_a_change_of_an_option_that_overrides_set_names_them(
    http: httpx.Client, server: Server, submit: Callable[..., str]
) -> None:
    earlier = Earlier(server, submit(fine_tuning_options={"extras": {"seed": 1}}, overrides="epochs=3 lr=1e-4"))
    options = {"n_epochs": 2}
    assert problems(http, earlier, config={"fine_tuning_options": options}) == {
        "config.fine_tuning_options.n_epochs": "duplicate_key"
    }
    assert problems(http, earlier, config={"overrides": "seed=2"}) == {"config.overrides": "duplicate_key"}
    job = again(http, earlier, config={"fine_tuning_options": options, "overrides": "lr=1e-4"})
    assert job["input_config"]["fine_tuning_options"]["n_epochs"] == 2


def test_another_method_takes_nothing_over_from_the_options_of_the_old_one(
    http: httpx.Client, earlier: Earlier
) -> None:
    same = {"fine_tuning_options": {"custom_training_options": {"finetuning_type": "LoraFineTuneOptions"}}}
    job = again(http, earlier, config=same)
    assert job["input_config"]["fine_tuning_options"]["custom_training_options"]["lora_rank"] == 4
    other = {"fine_tuning_options": {"custom_training_options": {"finetuning_type": "full"}}}
    job = again(http, earlier, config=other)
    assert job["input_config"]["fine_tuning_options"]["custom_training_options"] == {"finetuning_type": "full"}


def test_a_job_that_has_ended_can_be_gone_on_from_and_so_can_one_that_was_made_from_it(
    http: httpx.Client, server: Server, earlier: Earlier
) -> None:
    server.append(earlier.job_id, JobSucceeded(attempt=1))
    second = Earlier(server, again(http, earlier)["job_id"])
    third = again(http, second, checkpoint=10)
    assert third["resubmitted_from"]["job_id"] == second.job_id
    assert third["input_config"]["model"] == str(second.paths[10] / "merged")


def test_everything_wrong_is_reported_at_once_by_the_field_to_mend(http: httpx.Client, earlier: Earlier) -> None:
    changes = {"model": "llama-3.2-1b", "data": "/etc/passwd", "fine_tuning_options": {"lr": -1}, "batch_size": 2}
    assert problems(http, earlier, checkpoint=30, config=changes) == {
        "checkpoint": "checkpoint_not_found",
        "config.model": "not_allowed",
        "config.data": "path_outside_roots",
        "config.fine_tuning_options.lr": "greater_than",
        "config.batch_size": "unknown_field",
    }


@pytest.mark.parametrize("path", ["/etc", "models/tiny", "jobs/../jobs"])
def test_only_the_jobs_own_checkpoints_can_be_named(http: httpx.Client, earlier: Earlier, path: str) -> None:
    elsewhere = (earlier.server.parts.settings.storage / path).as_uri()
    assert problems(http, earlier, checkpoint=elsewhere) == {"checkpoint": "checkpoint_not_found"}


def test_a_checkpoint_of_another_job_is_not_taken(http: httpx.Client, server: Server, earlier: Earlier) -> None:
    other = Earlier(server, again(http, earlier)["job_id"])
    assert problems(http, earlier, checkpoint=other.uri(10)) == {"checkpoint": "checkpoint_not_found"}


def test_a_deleted_checkpoint_is_refused(http: httpx.Client, server: Server, earlier: Earlier) -> None:
    server.append(earlier.job_id, CheckpointsDeleted(attempt=1, uris=[earlier.uri(10)]))
    assert problems(http, earlier, checkpoint=10) == {"checkpoint": "checkpoint_not_found"}
    shutil.rmtree(earlier.paths[20])  # by hand: the log doesn't know
    assert problems(http, earlier) == {"checkpoint": "checkpoint_not_found"}


def test_a_job_without_a_checkpoint_has_nothing_to_go_on_from(http: httpx.Client, submit: Callable[..., str]) -> None:
    answer = http.post(RESUBMIT, json={"job_id": submit()})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "no_checkpoint"


def test_an_unknown_job_is_a_404(http: httpx.Client) -> None:
    answer = http.post(RESUBMIT, json={"job_id": "ftjob-none"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "job_id"


def test_what_is_wrong_with_the_request_itself_is_named(http: httpx.Client, earlier: Earlier) -> None:
    assert set(problems(http, earlier, checkpoint=-1.5, config=[], chekpoint=1)) == {
        "checkpoint",
        "config",
        "chekpoint",
    }


@pytest.mark.parametrize("checkpoint", [-1, 10.5, True, []])
def test_a_wrong_checkpoint_is_told_once(http: httpx.Client, earlier: Earlier, checkpoint: object) -> None:
    answer = http.post(RESUBMIT, json={"job_id": earlier.job_id, "checkpoint": checkpoint})
    (problem,) = answer.json()["error"]["errors"]
    assert problem["param"] == "checkpoint"


def test_an_idempotency_key_makes_one_job(http: httpx.Client, earlier: Earlier) -> None:
    body = {"job_id": earlier.job_id, "checkpoint": 10}
    ids = {http.post(RESUBMIT, json=body, headers={"Idempotency-Key": "r"}).json()["job_id"] for _ in range(3)}
    assert len(ids) == 1


@pytest.mark.parametrize("checkpoint", [None, 20, "uri"])
def test_a_retry_with_the_key_gets_its_job_also_when_the_checkpoint_is_gone_and_another_is_the_last(
    http: httpx.Client, earlier: Earlier, checkpoint: int | str | None
) -> None:
    changes = {"fine_tuning_options": {"lr": 1e-5, "extras": None}}
    body: dict[str, object] = {"job_id": earlier.job_id, "config": changes}
    if checkpoint is not None:
        body["checkpoint"] = earlier.uri(20) if checkpoint == "uri" else checkpoint
    headers = {"Idempotency-Key": f"gone {checkpoint}"}
    first = http.post(RESUBMIT, json=body, headers=headers).json()
    shutil.rmtree(earlier.paths[20])
    later = earlier.server.parts.settings.job_dir(earlier.job_id) / "checkpoints" / "step-00000030"
    make_tiny_model(later)
    earlier.server.append(earlier.job_id, CheckpointSaved(attempt=1, step=30, epoch=0, uri=later.as_uri()))
    assert http.post(RESUBMIT, json=body, headers=headers).json() == first
    others: list[dict[str, object]] = [{"checkpoint": 10}, {"config": {}}, {"config": {**changes, "model": "m"}}]
    for other in others:
        answer = http.post(RESUBMIT, json=body | other, headers=headers)
        assert answer.json()["error"]["code"] == "idempotency_key_reused"


def test_a_key_of_a_submit_is_not_for_a_resubmit(http: httpx.Client, earlier: Earlier, config: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "of a submit"}
    assert http.post("/fine_tuning/jobs/submit", json=config, headers=headers).status_code == 200
    answer = http.post(RESUBMIT, json={"job_id": earlier.job_id}, headers=headers)
    assert answer.json()["error"]["code"] == "idempotency_key_reused"


def test_the_service_trains_on_no_path_that_it_would_not_take_as_a_model(
    http: httpx.Client, earlier: Earlier, config: dict[str, Any]
) -> None:
    """A checkpoint may be submitted as a model like any other: resubmit opens nothing."""
    model = str(earlier.paths[10] / "merged")
    assert http.post("/fine_tuning/jobs/submit", json=config | {"model": model}).status_code == 200
    outside = Path("/etc").as_posix()
    assert http.post("/fine_tuning/jobs/submit", json=config | {"model": outside}).status_code == 422
