"""Programs that know only the contract: a generated client, and a generator of requests."""

import threading
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from events.facts import CancelRequested, JobCancelled
from tests.serve_app.client_journey import generate_client, journey
from tests.serve_app.live_server import MODEL, Serve, Server
from tests.tiny_models import make_tiny_model
from tests.waiting import WAIT_S, eventually

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
        """Does the dispatcher's part of a cancellation."""
        while not done.wait(0.02):
            for job in server.do(server.parts.log.live_jobs()).jobs:
                if job.cancel_requested:
                    server.append(job.job_id, JobCancelled())

    dispatcher = threading.Thread(target=cancel_what_is_asked_to_be)
    dispatcher.start()
    try:
        assert journey(package, server.url, **server.config()) == "cancelled"
    finally:
        done.set()
        dispatcher.join()


def test_no_generated_request_meets_a_server_error_or_an_answer_that_is_not_documented(serve: Serve) -> None:
    """Good and bad requests, derived from the served document; each check compares the answer with the document."""
    server = serve(heartbeat_s=0.5, webhook_networks="127.0.0.0/8")
    # The contract calls data a URI. Bare paths are taken too, and echoed as they were sent, so none is used here.
    storage = server.parts.settings.storage
    good = {"model": str(make_tiny_model(storage / "tiny")), "data": (storage / "rows.jsonl").as_uri()}
    job_id = server.submit(**good)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) == 41
    operations.sort(key=lambda operation: operation.method == "delete")  # so that the others find what there is
    rows = {"file": ("rows.jsonl", b'{"messages": []}\n')}
    file_id = httpx.post(f"{server.url}/v1/files", files=rows, data={"purpose": "fine-tune"}).json()["id"]
    upload = {"bytes": 9, "filename": "f", "mime_type": "application/jsonl", "purpose": "fine-tune"}
    upload_id = httpx.post(f"{server.url}/v1/uploads", json=upload).json()["id"]
    hook: dict[str, Any] = {
        "name": "x",
        "url": "http://127.0.0.1:9/",
        "event_types": ["fine_tuning.job.cancelled"],
    }
    hook_id = httpx.post(f"{server.url}/v1/webhook_endpoints", json=hook).json()["id"]
    over = server.submit(**good)
    server.append(over, CancelRequested(), JobCancelled())
    real = {**good, "job_id": job_id, "file_id": file_id, "upload_id": upload_id, "training_file": file_id}
    real |= {"webhook_endpoint_id": hook_id, "delivery_id": first_delivery(server, hook_id)}
    for operation in operations:
        exercise(operation, real)


def first_delivery(server: Server, endpoint_id: str) -> str:
    def deliveries() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{server.url}/v1/webhook_endpoints/{endpoint_id}/deliveries").json()[
            "data"
        ]
        return found

    return str(eventually(deliveries, WAIT_S, lambda: "no delivery is noted")[0]["id"])


def exercise(operation: schemathesis.APIOperation[Any, Any, Any, Any], real: dict[str, str]) -> None:
    """Gives half of the requests `real` names of jobs, models and data: otherwise all would be answered with 404."""
    good = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    bad = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @given(case=good | bad, use_real=booleans())
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def run(case: schemathesis.Case[Any], use_real: bool) -> None:
        if use_real:
            for part in (case.query, case.body, case.path_parameters):
                if isinstance(part, dict):
                    part.update({name: real[name] for name in part.keys() & real.keys()})
        if operation.path.endswith("/chat/completions") and isinstance(case.body, dict) and "model" in case.body:
            case.body["max_tokens"] = 3
            case.body.pop("max_completion_tokens", None)
            if case.body["model"] == MODEL:  # the documented example's, which takes long to load
                case.body["model"] = real["model"]
        if operation.path.endswith("/tail"):
            case.query["follow"] = "false"  # or the stream would not end
        case.call_and_validate(checks=list(CHECKS))

    run()
