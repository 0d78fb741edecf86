"""/v1/webhook_endpoints: URLs that are called when a job is over. OpenAI has no `deliveries` and no `redeliver`."""

import hashlib
from typing import Annotated, get_args

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response

from events.decide import Refused
from serve_app.openai.objects import (
    OpenAIWebhookDelivery,
    OpenAIWebhookDeliveryList,
    OpenAIWebhookEndpoint,
    OpenAIWebhookEndpointDeleted,
    OpenAIWebhookEndpointList,
    OpenAIWebhookEndpointWithSecret,
    OpenAIWebhookEventTypeList,
    OpenAIWebhookRequest,
    OpenAIWebhookRotation,
    OpenAIWebhookTest,
    OpenAIWebhookTestResult,
    OpenAIWebhookUpdate,
)
from serve_app.openai.paging import After, Limit, page
from serve_app.openapi import documented, json_body
from serve_app.routes import Key, TheBackend, idempotency_header, received
from trainers.webhooks.store import Delivery, Endpoint, EventType, new_endpoint_id, new_secret

router = APIRouter(prefix="/v1", default_response_class=Response)
ENDPOINTS = "/webhook_endpoints"
ENDPOINT = f"{ENDPOINTS}/{{webhook_endpoint_id}}"
EndpointId = Annotated[
    str, Path(alias="webhook_endpoint_id", min_length=1, max_length=128, description="The endpoint's id.")
]
DeliveryId = Annotated[str, Path(min_length=1, max_length=128, description="The id of the event.")]
IdempotencyKey = Annotated[
    Key, idempotency_header("returns the endpoint that the first request made, with its secret.")
]


@router.post(
    ENDPOINTS,
    summary="Create a webhook endpoint",
    openapi_extra=json_body(OpenAIWebhookRequest),
    responses=documented(OpenAIWebhookEndpointWithSecret, "The endpoint, with its secret.", 400, 413, 415, 429),
)
async def create(request: Request, backend: TheBackend, key: IdempotencyKey = None) -> Response:
    """Have a URL called when a job ends, from now on. The secret that signs the calls is shown only this once, and to
    a retry with the same Idempotency-Key."""
    asked = await received(OpenAIWebhookRequest, request, backend)
    secret, types = new_secret(), list(asked.event_types)
    endpoint_id = new_endpoint_id() if key is None else _id_of(key)
    endpoint = await backend.webhooks.create(endpoint_id, secret, asked.name, asked.url, types)
    if key is not None:
        if (endpoint.name, endpoint.url, list(endpoint.event_types)) != (asked.name, asked.url, types):
            message = f"this Idempotency-Key was used for {endpoint_id}, which is a different endpoint: take a new key"
            raise Refused("idempotency_key_reused", message)
        secret = await backend.webhooks.secret(endpoint_id)
    return _with_secret(endpoint, secret)


@router.get(
    ENDPOINTS,
    summary="List webhook endpoints",
    responses=documented(OpenAIWebhookEndpointList, "The endpoints.", 400, 404),
)
async def list_endpoints(backend: TheBackend, limit: Limit = 20, after: After = None) -> Response:
    """All endpoints, newest first."""
    endpoints, more = await backend.webhooks.endpoints(limit, after)
    return JSONResponse(page([_shown(endpoint) for endpoint in endpoints], more))


@router.get(
    "/webhook_event_types",
    summary="List event types",
    responses=documented(OpenAIWebhookEventTypeList, "The event types."),
)
async def event_types() -> Response:
    """The types of event that can be sent to an endpoint."""
    return JSONResponse(OpenAIWebhookEventTypeList(data=list(get_args(EventType))).model_dump(mode="json"))


@router.get(
    ENDPOINT,
    summary="Retrieve a webhook endpoint",
    responses=documented(OpenAIWebhookEndpoint, "The endpoint.", 400, 404),
)
async def retrieve(backend: TheBackend, endpoint_id: EndpointId) -> Response:
    """The endpoint, without its secret."""
    return _answer(await backend.webhooks.endpoint(endpoint_id))


@router.post(
    ENDPOINT,
    summary="Update a webhook endpoint",
    openapi_extra=json_body(OpenAIWebhookUpdate),
    responses=documented(OpenAIWebhookEndpoint, "The endpoint.", 400, 404, 413, 415),
)
async def update(request: Request, backend: TheBackend, endpoint_id: EndpointId) -> Response:
    """Change the endpoint. If it was disabled because it answered 410 Gone, it is enabled again."""
    asked = await received(OpenAIWebhookUpdate, request, backend)
    types = None if asked.event_types is None else list(asked.event_types)
    return _answer(await backend.webhooks.update(endpoint_id, asked.name, asked.url, types))


@router.delete(
    ENDPOINT,
    summary="Delete a webhook endpoint",
    responses=documented(OpenAIWebhookEndpointDeleted, "The endpoint was deleted.", 400, 404),
)
async def delete(backend: TheBackend, endpoint_id: EndpointId) -> Response:
    """Delete the endpoint, its secret and its deliveries. A delivery that is on its way may still arrive."""
    await backend.webhooks.delete(endpoint_id)
    return JSONResponse(OpenAIWebhookEndpointDeleted(id=endpoint_id).model_dump(mode="json"))


@router.post(
    f"{ENDPOINT}/rotate_secret",
    summary="Rotate an endpoint's secret",
    openapi_extra=json_body(OpenAIWebhookRotation),
    responses=documented(
        OpenAIWebhookEndpointWithSecret, "The endpoint, with its new secret.", 400, 404, 413, 415, 429
    ),
)
async def rotate_secret(request: Request, backend: TheBackend, endpoint_id: EndpointId) -> Response:
    """Give the endpoint a new secret, which is shown only this once. Each old secret that is kept also signs for 24
    hours, up to ten of them, so it does no harm to try again. Rotating without keeping the old one ends all of them."""
    asked = await received(OpenAIWebhookRotation, request, backend)
    secret, keep_old = new_secret(), bool(asked.keep_old_secret_active_for_24_hours)
    return _with_secret(await backend.webhooks.rotate(endpoint_id, secret, keep_old=keep_old), secret)


@router.post(
    f"{ENDPOINT}/test",
    summary="Test a webhook endpoint",
    openapi_extra=json_body(OpenAIWebhookTest),
    responses=documented(OpenAIWebhookTestResult, "The endpoint answered with a 2xx.", 400, 404, 413, 415),
)
async def test(request: Request, backend: TheBackend, endpoint_id: EndpointId) -> Response:
    """Send one event of a made-up job, `ftjob-test`, and return the status code of the endpoint's answer."""
    asked = await received(OpenAIWebhookTest, request, backend)
    status_code = await backend.webhooks.test(endpoint_id, asked.event_type)
    result = OpenAIWebhookTestResult(
        webhook_endpoint_id=endpoint_id, event_type=asked.event_type, status_code=status_code
    )
    return JSONResponse(result.model_dump(mode="json"))


@router.get(
    f"{ENDPOINT}/deliveries",
    summary="List an endpoint's deliveries",
    responses=documented(OpenAIWebhookDeliveryList, "The deliveries.", 400, 404),
)
async def list_deliveries(
    backend: TheBackend, endpoint_id: EndpointId, limit: Limit = 20, after: After = None
) -> Response:
    """What was sent to the endpoint in the last 30 days, and what is still to be sent, newest first."""
    deliveries, more = await backend.webhooks.deliveries(endpoint_id, limit, after)
    return JSONResponse(page([_delivery(delivery) for delivery in deliveries], more))


@router.post(
    f"{ENDPOINT}/deliveries/{{delivery_id}}/redeliver",
    summary="Send a delivery again",
    responses=documented(OpenAIWebhookDelivery, "It will be sent again.", 400, 404, 409),
)
async def redeliver(backend: TheBackend, endpoint_id: EndpointId, delivery_id: DeliveryId) -> Response:
    """Send an event again now, with the same id, whatever became of it, and retry as often as for a new one."""
    delivery = await backend.webhooks.redeliver(endpoint_id, delivery_id)
    return JSONResponse(_delivery(delivery).model_dump(mode="json"))


def _id_of(key: str) -> str:
    return f"we_{hashlib.sha256(key.encode()).hexdigest()[:26]}"


def _answer(endpoint: Endpoint) -> Response:
    return JSONResponse(_shown(endpoint).model_dump(mode="json"))


def _with_secret(endpoint: Endpoint, secret: str) -> Response:
    shown = OpenAIWebhookEndpointWithSecret(**_shown(endpoint).model_dump(), signing_secret=secret)
    return JSONResponse(shown.model_dump(mode="json"))


def _shown(endpoint: Endpoint) -> OpenAIWebhookEndpoint:
    return OpenAIWebhookEndpoint(
        id=endpoint.id,
        created_at=int(endpoint.created_at),
        updated_at=int(endpoint.updated_at),
        name=endpoint.name,
        url=endpoint.url,
        event_types=list(endpoint.event_types),
        signing_secret_hint=endpoint.signing_secret_hint,
        status="enabled" if endpoint.enabled else "disabled",
    )


def _delivery(delivery: Delivery) -> OpenAIWebhookDelivery:
    return OpenAIWebhookDelivery(
        id=delivery.notice.event_id,
        created_at=int(delivery.notice.time),
        event_type=delivery.notice.event_type,
        job_id=delivery.notice.job_id,
        status=delivery.status,
        attempts=delivery.attempts,
        last_attempt_at=_seconds(delivery.last_attempt_at),
        next_attempt_at=_seconds(delivery.next_attempt_at),
        last_status_code=delivery.last_status_code,
        last_error=delivery.last_error,
    )


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
