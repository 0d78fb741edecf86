"""Programs that know only the contract: a generated client, and a generator of requests."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from events.facts import JobCancelled
from tests.serve_app.client_journey import generate_client, journey
from tests.serve_app.live_server import Server

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)


def test_a_client_generated_from_the_contract_submits_polls_cancels_and_reads(server: Server, tmp_path: Path) -> None:
    package = generate_client(tmp_path)
    done = threading.Event()

    def cancel_what_is_asked_to_be() -> None:
        """The dispatcher's part of a cancellation."""
        while not done.is_set():
            for job in server.do(server.parts.log.live_jobs()):
                if job.cancel_requested:
                    server.append(job.job_id, JobCancelled())
            time.sleep(0.02)

    dispatcher = threading.Thread(target=cancel_what_is_asked_to_be)
    dispatcher.start()
    try:
        rows = str(server.parts.settings.storage / "rows.jsonl")
        journey(package, server.url, model="smollm2-135m-instruct", data=rows)
    finally:
        done.set()
        dispatcher.join()


def test_no_generated_request_meets_a_server_error_or_an_answer_that_is_not_documented(
    server: Server, submit: Callable[..., str]
) -> None:
    """Good and bad requests, derived from the served document; each check compares the answer with the document."""
    job_id = submit()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:
        exercise(operation, job_id)


def exercise(operation: schemathesis.APIOperation[Any, Any, Any, Any], job_id: str) -> None:
    good = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    bad = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @given(case=good | bad, real=booleans())
    @settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    def run(case: schemathesis.Case, real: bool) -> None:
        if real and "job_id" in case.query:
            case.query["job_id"] = job_id
        if operation.path.endswith("/tail"):
            case.query["follow"] = "false"  # or the stream would not end
        case.call_and_validate(checks=CHECKS)

    run()
