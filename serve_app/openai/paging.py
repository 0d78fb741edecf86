"""Pages of lists, in the form that OpenAI's client reads."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema

from serve_app.errors import Answer, RequestRefused

Limit = Annotated[int, Query(ge=1, le=100, description="How many.")]
Cursor = Annotated[str, Field(min_length=1, max_length=256)] | SkipJsonSchema[None]
After = Annotated[Cursor, Query(description="Only entries older than this one: the last id of the previous page.")]


def page(data: Sequence[BaseModel], has_more: bool) -> dict[str, Any]:
    """One page of a list, from objects of `serve_app.openai.objects`."""
    shown = [item.model_dump(mode="json") for item in data]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": has_more}


def unknown_after(after: str, kind: str) -> RequestRefused:
    message = f"after: there is no {kind} {after!a} in this list"
    return RequestRefused(Answer(404, "not_found_error", "unknown_after", message, "after"))
