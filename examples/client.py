"""A client of the fine-tuning API in one page: submit, status, tail, pause, cancel. Plain HTTP; copy what you need.

python -m examples.client http://127.0.0.1:8000 examples/tickets/job.json      submit, follow the log, print the job
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

Job = dict[str, Any]
TERMINAL = ("success", "failed", "cancelled")
RECONNECT_S = 1.0
RESTARTING = (502, 503, 504)  # answers of the service, or of the proxy in front of it, during a restart


class ApiError(Exception):
    """The service refused a request. `error` is the body's `error` object: message, type, param, code."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status}: {error['message']}")
        self.status = status
        self.error = error


class Client:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # A tail is silent for up to the heartbeat (15 s), then there is at least an empty line.
        self._http = httpx.Client(base_url=self.url, timeout=httpx.Timeout(60), trust_env=False)

    def healthy(self) -> bool:
        try:
            return self._http.get("/healthz", timeout=2).is_success
        except httpx.TransportError:
            return False

    def submit(self, config: dict[str, Any], idempotency_key: str | None = None) -> Job:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._answer(self._http.post("/fine_tuning/jobs/submit", json=config, headers=headers))

    def status(self, job_id: str) -> Job:
        return self._answer(self._http.get("/fine_tuning/jobs/status", params={"job_id": job_id}))

    def cancel(self, job_id: str) -> Job:
        return self._answer(self._http.post("/fine_tuning/jobs/cancel", json={"job_id": job_id}))

    def pause(self, job_id: str) -> Job:
        return self._answer(self._http.post("/fine_tuning/jobs/pause", json={"job_id": job_id}))

    def resume(self, job_id: str) -> Job:
        return self._answer(self._http.post("/fine_tuning/jobs/resume", json={"job_id": job_id}))

    def resubmit(self, job_id: str, checkpoint: str | int | None = None, config: dict[str, Any] | None = None) -> Job:
        """A new job from a checkpoint of an earlier one (a URI or a step; default: the last one), with changes to its
        config."""
        body = {"job_id": job_id, "checkpoint": checkpoint, "config": config}
        return self._answer(self._http.post("/fine_tuning/jobs/resubmit", json=body))

    def tail(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The job's log from its first line to its last, each `{"message", "timestamp"}`. Ends when the job has ended.

        After a broken connection or a restart of the service it goes on where it stopped. Raises ApiError if refused.
        """
        offset = 0
        while True:
            try:
                for line in self._tail_lines(job_id, offset):
                    yield from line["logs"]
                    offset = line["next"]
                    if "status" in line:
                        return
                time.sleep(RECONNECT_S)  # the service is being restarted, and said so
            except httpx.TransportError:
                time.sleep(RECONNECT_S)
            except ApiError as error:
                if error.status not in RESTARTING:
                    raise
                time.sleep(RECONNECT_S)

    def _tail_lines(self, job_id: str, offset: int) -> Iterator[dict[str, Any]]:
        with self._http.stream("GET", "/fine_tuning/jobs/tail", params={"job_id": job_id, "after": offset}) as answer:
            if not answer.is_success:
                answer.read()
                self._answer(answer)
            for line in answer.iter_lines():
                yield json.loads(line)

    @staticmethod
    def _answer(answer: httpx.Response) -> Job:
        try:
            body: Job = answer.json()
        except ValueError:  # from a proxy in front of the service, which may know no path during a restart
            status = 503 if answer.status_code in (404, 500) else answer.status_code
            raise ApiError(status, {"message": answer.text.strip() or answer.reason_phrase}) from None
        if not answer.is_success:
            raise ApiError(answer.status_code, body["error"])
        return body


def main(url: str, config: Path) -> int:
    client = Client(url)
    job = client.submit(json.loads(config.read_text()))
    for line in client.tail(job["job_id"]):
        print(line["timestamp"], line["message"])
    job = client.status(job["job_id"])
    print(json.dumps(job, indent=2))
    return 0 if job["status"] == "success" else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1], Path(sys.argv[2])))
    except ApiError as refused:
        sys.exit(str(refused))
    except httpx.TransportError as error:
        sys.exit(f"{sys.argv[1]} doesn't answer: {error}")
