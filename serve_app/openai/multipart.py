"""Receives multipart/form-data with one file, which is written to storage as it arrives, never held in memory whole."""

import asyncio
from typing import NamedTuple, Protocol

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serve_app.errors import Answer, RequestRefused
from trainers.errors import Problem

WRITE_BYTES = 1 << 20
"""Bytes of the file that are buffered before they are written."""
MAX_FIELD_BYTES = 64 << 10
"""Maximum size of everything in the form but the file: names, headers, values."""


class Sink(Protocol):
    """Takes the bytes of the file. Its methods block."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Form(NamedTuple):
    fields: dict[str, str]
    filename: str


class Limit(NamedTuple):
    """Maximum size of the file, and the advice in the error for a larger one."""

    max_bytes: int
    beyond: str


async def receive(request: Request, file_field: str, sink: Sink, limit: Limit) -> Form:
    """Writes the form's file to `sink`, which is closed when this returns. Returns the rest of the form.

    Raises RequestRefused: 400 for an invalid form, 413 for a file beyond the limit, 415 for another type of body.
    Whatever it raises, also ClientDisconnect, the sink has been abandoned.
    """
    try:
        form = await _receive(request, file_field, sink, limit)
        await asyncio.to_thread(sink.close)
    except BaseException:
        await asyncio.shield(asyncio.to_thread(sink.abandon))
        raise
    return form


def declared_bytes(request: Request) -> int:
    """The Content-Length; 0 if there is none, or none that could be true."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0


async def _receive(request: Request, file_field: str, sink: Sink, limit: Limit) -> Form:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        message = "send the body as multipart/form-data, with its boundary: clients make that header by themselves"
        raise RequestRefused(Answer(415, "invalid_request_error", "unsupported_media_type", message))
    if declared_bytes(request) > limit.max_bytes + MAX_FIELD_BYTES:
        raise _too_large(file_field, limit)
    parser = _Parser(options[b"boundary"], file_field, limit)
    async for chunk in request.stream():
        parser.feed(chunk)
        if parser.waiting >= WRITE_BYTES:
            await asyncio.to_thread(sink.write, parser.take())
    if rest := parser.take():
        await asyncio.to_thread(sink.write, rest)
    return parser.form()


class _Parser:
    """Parses a form chunk by chunk, and separates the file's bytes from the other fields."""

    def __init__(self, boundary: bytes, file_field: str, limit: Limit) -> None:
        self._file_field = file_field
        self._limit = limit
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._name = ""
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._small = 0
        self._file_bytes = 0
        self._file_data: list[bytes] = []
        self.waiting = 0
        """Bytes of the file that `take` would return."""
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_part_data": self._on_part_data,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_end": self._on_end,
                },
            )
        except ValueError as error:  # an odd boundary
            raise _bad_form(str(error)) from None

    def feed(self, chunk: bytes) -> None:
        if not chunk:
            return
        try:
            self._parser.write(chunk)
        except MultipartParseError:
            raise _bad_form("the form can't be parsed as multipart/form-data") from None

    def take(self) -> bytes:
        """The file's bytes since the last call."""
        data, self._file_data, self.waiting = b"".join(self._file_data), [], 0
        return data

    def form(self) -> Form:
        """The form, once the whole body has been fed."""
        if not self._complete:
            raise _bad_form("the form ends before its last boundary")
        if self._filename is None:
            raise _bad_form("is required", self._file_field, "missing")
        try:
            fields = {name: value.decode() for name, value in self._fields.items()}
        except UnicodeDecodeError:
            raise _bad_form("a field of the form is not UTF-8") from None
        return Form(fields, self._filename)

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += self._counted(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def _on_header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == self._file_field:
            if self._filename is not None:
                raise _bad_form("is there twice", self._file_field)
            self._filename = options.get(b"filename", b"file").decode(errors="replace")
        elif self._name in self._fields:
            raise _bad_form("is there twice", self._name)
        else:
            self._fields[self._name] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != self._file_field:
            self._fields[self._name] += self._counted(data[start:end])
            return
        self._file_bytes += end - start
        if self._file_bytes > self._limit.max_bytes:
            raise _too_large(self._file_field, self._limit)
        self._file_data.append(bytes(data[start:end]))
        self.waiting += end - start

    def _on_end(self) -> None:
        self._complete = True

    def _counted(self, data: bytes) -> bytes:
        self._small += len(data)
        if self._small > MAX_FIELD_BYTES:
            raise _bad_form(f"the form's fields are together longer than {MAX_FIELD_BYTES} bytes")
        return data


def _bad_form(message: str, param: str | None = None, code: str = "invalid_form") -> RequestRefused:
    name = None if param is None else ascii(param[:100])[1:-1]
    told = message if name is None else f"{name}: {message}"
    return RequestRefused(Answer(400, "invalid_request_error", code, told, name, [Problem(name, message, code)]))


def _too_large(file_field: str, limit: Limit) -> RequestRefused:
    message = f"the {file_field} is larger than {limit.max_bytes} bytes; {limit.beyond}"
    return RequestRefused(Answer(413, "invalid_request_error", "file_too_large", message, file_field))
