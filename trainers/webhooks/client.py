"""The API's client of `Webhooks`, which runs in the dispatcher's process."""

import asyncio
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayTaskError

from trainers.webhooks.deliverer import WebhooksUnavailable
from trainers.webhooks.store import Delivery, Endpoint, EventType

if TYPE_CHECKING:
    from trainers.dispatching.dispatcher_actor import DispatcherClient

CALL_S = 60.0
"""Time-out of a call: longer than a receiver may take to answer, and than the dispatcher takes to start again."""


class WebhooksClient:
    """Raises what `Webhooks` raises, WebhooksUnavailable if the dispatcher doesn't answer, and Ray's errors if it is
    gone. A call that was under way when it died is made again, with the same arguments."""

    def __init__(self, dispatcher: "DispatcherClient") -> None:
        self._dispatcher = dispatcher

    async def create(
        self, endpoint_id: str, secret: str, name: str, url: str, event_types: list[EventType]
    ) -> Endpoint:
        created: Endpoint = await self._call("create", endpoint_id, secret, name, url, event_types)
        return created

    async def secret(self, endpoint_id: str) -> str:
        secret: str = await self._call("secret", endpoint_id)
        return secret

    async def endpoints(self, limit: int, after: str | None) -> tuple[list[Endpoint], bool]:
        page: tuple[list[Endpoint], bool] = await self._call("endpoints", limit, after)
        return page

    async def endpoint(self, endpoint_id: str) -> Endpoint:
        endpoint: Endpoint = await self._call("endpoint", endpoint_id)
        return endpoint

    async def update(
        self, endpoint_id: str, name: str | None, url: str | None, event_types: list[EventType] | None
    ) -> Endpoint:
        endpoint: Endpoint = await self._call("update", endpoint_id, name, url, event_types)
        return endpoint

    async def delete(self, endpoint_id: str) -> None:
        await self._call("delete", endpoint_id)

    async def rotate(self, endpoint_id: str, secret: str, *, keep_old: bool) -> Endpoint:
        rotated: Endpoint = await self._call("rotate", endpoint_id, secret, keep_old=keep_old)
        return rotated

    async def test(self, endpoint_id: str, event_type: EventType) -> int:
        status_code: int = await self._call("test", endpoint_id, event_type)
        return status_code

    async def deliveries(self, endpoint_id: str, limit: int, after: str | None) -> tuple[list[Delivery], bool]:
        page: tuple[list[Delivery], bool] = await self._call("deliveries", endpoint_id, limit, after)
        return page

    async def redeliver(self, endpoint_id: str, event_id: str) -> Delivery:
        delivery: Delivery = await self._call("redeliver", endpoint_id, event_id)
        return delivery

    async def _call(self, method: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401  -- as the method
        try:
            async with asyncio.timeout(CALL_S):
                return await self._dispatcher.call("webhooks", method, *arguments, **options)
        except RayTaskError as error:
            raise error.cause from error
        except TimeoutError as error:
            raise WebhooksUnavailable(f"the dispatcher does not answer within {CALL_S:g} s") from error
