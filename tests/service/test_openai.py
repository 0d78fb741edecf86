"""OpenAI's client from the file to the results, on the whole service."""

import csv
import io
import json

from tests.asking import client_of
from tests.service.conftest import Api


def test_a_job_of_uploaded_files_ends_with_its_metrics_as_a_file(api: Api) -> None:
    client = client_of(api.service.url)
    dialogs = [json.loads(line)["dialog"] for line in api.data.read_text().splitlines()]
    rows = "".join(json.dumps({"messages": dialog}) + "\n" for dialog in dialogs).encode()
    files = [client.files.create(file=(f"{name}.jsonl", rows), purpose="fine-tune") for name in ("train", "valid")]
    job = client.fine_tuning.jobs.create(
        model=str(api.model),
        training_file=files[0].id,
        validation_file=files[1].id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 30}},  # of a random model
        },
        suffix="end-to-end",
        metadata={"why": "to see it work"},
    )
    assert api.until_status(job.id, "success")["job_id"] == job.id  # one job, one identity on both faces

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.metadata) == ("succeeded", {"why": "to see it work"})
    assert done.fine_tuned_model is not None
    assert "end-to-end" in done.fine_tuned_model
    (result,) = done.result_files
    first, *table = csv.DictReader(io.StringIO(client.files.content(result).text))
    assert (first["step"], first["train_loss"]) == ("0", "")  # the model as it was, on the validation file
    steps = api.job(job.id)["progress"]["total_steps"]
    assert [int(row["step"]) for row in table] == list(range(1, steps + 1))
    assert all(0 <= float(row["train_mean_token_accuracy"]) <= 1 for row in table)
    assert float(table[-1]["full_valid_loss"]) < float(first["full_valid_loss"])
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # pages of five, to the last
    assert sum(event.type == "metrics" for event in events) >= len(table)
    client.files.delete(files[0].id)
