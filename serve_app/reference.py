"""GET /docs: the OpenAPI document as one page of plain HTML. It loads nothing, so it works without internet."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_TEMPLATES = Environment(
    loader=PackageLoader("serve_app", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Row(NamedTuple):
    """A parameter or a property, for a table. `place`: of a parameter `path`, `query` or `header`; "": a property."""

    name: str
    type: str
    limits: str
    required: bool
    default: Any
    description: str
    place: str = ""


class Response(NamedTuple):
    """`body`: name of its schema. `media_type`: "" for JSON."""

    status: str
    body: str
    media_type: str
    description: str


class Operation(NamedTuple):
    """`curl`: curl's arguments, ready to be pasted, with placeholders in capitals. `body`: name of the schema of its
    body, "" if it has none."""

    method: str
    path: str
    description: str
    curl: str
    parameters: list[Row]
    body: str
    responses: list[Response]


class Schema(NamedTuple):
    name: str
    description: str
    example: str
    rows: list[Row]


def page(document: dict[str, Any], base_url: str) -> str:
    """The reference as HTML. `base_url` is where the reader reached the service: the curl lines use it."""
    schemas = document["components"]["schemas"]
    return _TEMPLATES.get_template("reference.html.jinja").render(
        info=document["info"],
        operations=list(_operations(document, base_url.rstrip("/"))),
        schemas=[
            Schema(name, schema.get("description", ""), _example(schema), _properties(schema))
            for name, schema in schemas.items()
        ],
        prose=partial(_prose, known=schemas.keys()),
        linked=partial(_linked, known=schemas.keys()),
    )


def _prose(text: str, known: set[str]) -> Markup:
    """Paragraphs of a description as HTML: `code` in backticks, the names of schemas as links."""
    paragraphs = (_code(paragraph, known) for paragraph in text.split("\n\n") if paragraph)
    return Markup("\n").join(Markup("<p>{}</p>").format(paragraph) for paragraph in paragraphs)


def _code(text: str, known: set[str]) -> Markup:
    pieces = text.split("`")  # every second piece was in backticks
    pieces[0::2] = [escape(piece) for piece in pieces[0::2]]
    pieces[1::2] = [Markup("<code>{}</code>").format(_linked(piece, known)) for piece in pieces[1::2]]
    return Markup("").join(pieces)


def _linked(text: str, known: set[str]) -> Markup:
    words = re.split(r"(\w+)", text)
    return Markup("").join(Markup('<a href="#{0}">{0}</a>').format(w) if w in known else escape(w) for w in words)


def _operations(document: dict[str, Any], base_url: str) -> Iterator[Operation]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters = [
                _row(p["name"], p["schema"] | _described(p), p.get("required", False), p["in"])
                for p in operation.get("parameters", [])
            ]
            yield Operation(
                method=method.upper(),
                path=path,
                description=operation.get("description", ""),
                curl=_curl(method.upper(), base_url + path, operation, document["components"]["schemas"]),
                parameters=parameters,
                body=_body(operation.get("requestBody", {})),
                responses=list(_responses(operation["responses"])),
            )


def _curl(method: str, url: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    names = [(p["name"], p["in"]) for p in operation.get("parameters", []) if p.get("required")]
    for name, place in names:
        if place == "path":
            url = url.replace(f"{{{name}}}", name.upper())
    query = "&".join(f"{name}={name.upper()}" for name, place in names if place == "query")
    body = _body_sent(operation.get("requestBody", {}), schemas)
    words = [shlex.quote(f"{url}?{query}" if query else url), *body]
    if method != ("POST" if body else "GET"):  # curl's default
        words = ["-X", method, *words]
    content = operation["responses"]["200"]["content"]
    if any("ndjson" in media_type for media_type in content):
        words = ["-N", *words]
    if any(answer["schema"].get("format") == "binary" for answer in content.values()):
        words = ["-fOJ", *words]  # into a file of the name that the service gives: curl refuses to print bytes
    return " ".join(words)


def _body_sent(body: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """The example of the body's schema, as curl's arguments."""
    for media_type in body.get("content", {}):
        schema = schemas[_body(body)]
        (example,) = schema["examples"]
        if media_type == "multipart/form-data":
            fields = schema["properties"]
            files = {name: "@" if fields[name].get("format") == "binary" else "" for name in example}
            return [word for name in example for word in ("-F", shlex.quote(f"{name}={files[name]}{example[name]}"))]
        return ["-H", shlex.quote(f"Content-Type: {media_type}"), "-d", shlex.quote(json.dumps(example))]
    return []


def _responses(responses: dict[str, dict[str, Any]]) -> Iterator[Response]:
    for status, response in responses.items():
        media_type = next(iter(response.get("content", {})), "")
        shown = "" if media_type == "application/json" else media_type
        yield Response(status, _body(response), shown, response["description"])


def _body(holder: dict[str, Any]) -> str:
    """Name of the schema of a request's or a response's body, "" where it has none."""
    for content in holder.get("content", {}).values():
        return str(content["schema"].get("$ref", "").rsplit("/", 1)[-1])
    return ""


def _example(schema: dict[str, Any]) -> str:
    return json.dumps(schema["examples"][0]) if "examples" in schema else ""


def _described(parameter: dict[str, Any]) -> dict[str, Any]:
    return {"description": parameter["description"]} if "description" in parameter else {}


def _properties(schema: dict[str, Any]) -> list[Row]:
    required = schema.get("required", [])
    return [_row(name, inner, name in required) for name, inner in schema.get("properties", {}).items()]


def _row(name: str, schema: dict[str, Any], required: bool, place: str = "") -> Row:
    description = schema.get("description", "")
    return Row(name, _type(schema), _limits(schema), required, schema.get("default", ""), description, place)


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


def _limits(schema: dict[str, Any]) -> str:
    """`1 to 100`, `above 0`, `up to 128 characters`: what a number or a string may be, "" for anything."""
    if "minimum" in schema and "maximum" in schema:
        return f"{schema['minimum']:,} to {schema['maximum']:,}"
    bounds = [
        f"{word} {schema[key]:,}"
        for key, word in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "up to"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    if "maxLength" in schema:
        bounds.append(f"up to {schema['maxLength']:,} characters")
    return ", ".join(bounds)
