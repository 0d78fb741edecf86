"""GET /docs: the OpenAPI document as one page of plain HTML. It loads nothing, so it works without internet."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("serve_app", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Row(NamedTuple):
    """A parameter or a property, for a table."""

    name: str
    type: str
    refs: list[str]
    required: bool
    default: Any
    description: str


class Operation(NamedTuple):
    method: str
    path: str
    summary: str
    description: str
    parameters: list[Row]
    body: dict[str, Any] | None
    responses: dict[str, dict[str, Any]]


def page(document: dict[str, Any], base_url: str) -> str:
    """The reference as HTML. `base_url` is where the reader reached the service: the curl lines use it."""
    schemas = document["components"]["schemas"]
    return _TEMPLATES.get_template("reference.html.jinja").render(
        info=document["info"],
        base_url=base_url.rstrip("/"),
        operations=list(_operations(document)),
        schemas={name: (schema.get("description", ""), _properties(schema)) for name, schema in schemas.items()},
    )


def _operations(document: dict[str, Any]) -> Iterator[Operation]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield Operation(
                method=method.upper(),
                path=path,
                summary=operation.get("summary", ""),
                description=operation.get("description", ""),
                parameters=[
                    _row(p["name"], p["schema"] | _described(p), p.get("required", False))
                    for p in operation.get("parameters", [])
                ],
                body=operation["requestBody"]["content"]["application/json"]["schema"]
                if "requestBody" in operation
                else None,
                responses=operation["responses"],
            )


def _described(parameter: dict[str, Any]) -> dict[str, Any]:
    return {"description": parameter["description"]} if "description" in parameter else {}


def _properties(schema: dict[str, Any]) -> list[Row]:
    required = schema.get("required", [])
    return [_row(name, inner, name in required) for name, inner in schema.get("properties", {}).items()]


def _row(name: str, schema: dict[str, Any], required: bool) -> Row:
    return Row(
        name, _type(schema), list(_refs(schema)), required, schema.get("default", ""), schema.get("description", "")
    )


def _type(schema: dict[str, Any]) -> str:
    """`integer`, `string (date-time)`, `array of Log`, `full | lora`: a schema in a few words."""
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(_type(inner) for inner in schema[union])
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1])
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    return f"{kind} ({schema['format']})" if "format" in schema else kind


def _refs(schema: object) -> Iterator[str]:
    """Names of the schemas that `schema` mentions, so that the page can link to them."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rsplit("/", 1)[-1]
        for inner in schema.values():
            yield from _refs(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _refs(inner)
