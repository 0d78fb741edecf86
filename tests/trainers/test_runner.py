"""What the runner reads in a job's history. A whole run of it is in tests/service."""

from datetime import UTC, datetime
from pathlib import Path

from events.job import FineTuningJob
from trainers.runner import latest_checkpoint


def job_with(checkpoints: list[Path]) -> FineTuningJob:
    uris = [path.as_uri() for path in checkpoints]
    return FineTuningJob(
        job_id="ftjob-1", created=datetime.now(UTC), status="queued", input_config={}, checkpoints=uris
    )


def test_a_job_goes_on_from_its_newest_checkpoint_that_has_its_training_state(tmp_path: Path) -> None:
    checkpoints = [tmp_path / f"step-{step}" for step in (1, 2, 3)]
    for path in checkpoints:
        path.mkdir()
        if path.name != "step-3":
            (path / "training_state").mkdir()
    assert latest_checkpoint(job_with(checkpoints)) == checkpoints[1]
    assert latest_checkpoint(job_with(checkpoints[2:])) is None


def test_a_checkpoint_is_found_in_a_storage_directory_of_any_name(tmp_path: Path) -> None:
    checkpoint = tmp_path / "100% mine, größer #1?" / "step-1"
    (checkpoint / "training_state").mkdir(parents=True)
    assert latest_checkpoint(job_with([checkpoint])) == checkpoint
