"""What a user of the contract does: generate a client from the unmodified YAML, then submit, poll, cancel, read."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.waiting import eventually

CONTRACT = Path(__file__).parent / "fine_tuning_api.yaml"
PACKAGE = "fine_tuning_api_client"


def generate_client(directory: Path) -> Any:
    """Writes the client into `directory` and imports it."""
    program = [sys.executable, "-m", "openapi_python_client", "generate"]
    command = [*program, "--path", str(CONTRACT), "--meta", "none", "--output-path", str(directory / PACKAGE)]
    subprocess.run(command, check=True, capture_output=True, cwd=directory)
    sys.path.insert(0, str(directory))
    return importlib.import_module(PACKAGE)


def journey(package: Any, base_url: str, model: str, data: str) -> str:
    """Takes one job from submit to its end, with nothing but the generated client, and checks what it is told on the
    way. Returns the last status. Somebody must carry out the cancellation within a minute."""
    client = package.Client(base_url=base_url, raise_on_unexpected_status=True)
    models = importlib.import_module(f"{PACKAGE}.models")

    def call(name: str, **arguments: Any) -> Any:
        return importlib.import_module(f"{PACKAGE}.api.default.{name}").sync(client=client, **arguments)

    options = models.FineTuningOptions(
        n_epochs=1, lr=1e-4, custom_training_options=models.LoraFineTuneOptions(lora_rank=4, lora_alpha=8)
    )
    metadata = models.ConfigMetadata.from_dict({"made_by": "a generated client"})
    config = models.Config(
        model=model,
        data=data,
        fine_tuning_options=options,
        logger=models.DiskLogger(filename="m.jsonl"),
        metadata=metadata,
    )
    submitted = call("post_fine_tuning_jobs_submit", body=config)
    assert submitted.status.value == "validation"
    assert submitted.created.tzinfo is not None
    assert submitted.input_config.to_dict() == config.to_dict()
    assert submitted.metadata.to_dict() == metadata.to_dict()

    assert call("get_fine_tuning_jobs_status", job_id=submitted.job_id).job_id == submitted.job_id
    call("post_fine_tuning_jobs_cancel", body=models.PostFineTuningJobsCancelBody(job_id=submitted.job_id))

    def ended() -> Any:
        job = call("get_fine_tuning_jobs_status", job_id=submitted.job_id)
        return job if job.finished_at else None

    job = eventually(ended, 60, lambda: "the job does not end")
    assert job.finished_at >= job.created
    return str(job.status.value)
