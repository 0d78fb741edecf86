"""A receiver of webhooks: a real HTTP server that records requests, and may answer with errors or not at all."""

import socket
import ssl
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

import openai
from standardwebhooks import Webhook

Answer = int | str
"""A status code, `hang` (no answer) or `drop` (the connection is closed)."""


class Got(NamedTuple):
    """A request, and the answer to it."""

    path: str
    headers: dict[str, str]
    body: bytes
    answer: Answer


class Receiver:
    """`with Receiver(answer) as receiver:` listens on `receiver.url`. `answer` gets the number of the request, from 0.

    Requests that are answered with `hang` are kept waiting until the receiver is closed, or for 60 seconds.
    """

    def __init__(
        self,
        answer: Callable[[int], Answer] = lambda _: 200,
        headers: dict[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.got: list[Got] = []
        self.connections = 0
        self._answer = answer
        self._headers = headers or {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                receiver.connections += 1
                super().setup()

            def do_POST(self) -> None:
                receiver._receive(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: object) -> None:
                """Says nothing: a sender that was killed has closed its connection."""

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.02))

    def _receive(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        if len(body) < int(request.headers["content-length"]):
            return  # the sender was killed while sending
        with self._lock:
            answer = self._answer(len(self.got))
            self.got.append(Got(request.path, {k.lower(): v for k, v in request.headers.items()}, body, answer))
        if answer == "hang":
            self._closing.wait(60)
        elif answer == "drop":
            request.connection.shutdown(socket.SHUT_RDWR)
        else:
            request.send_response(int(answer))
            for name, value in self._headers.items():
                request.send_header(name, value)
            request.send_header("Content-Length", "0")
            request.end_headers()

    def delivered(self) -> list[Got]:
        """Requests that were answered with 200."""
        with self._lock:
            return [one for one in self.got if one.answer == 200]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def verified(got: Got, secret: str) -> Any:
    """The event as OpenAI's client reads it from the request. Raises unless both libraries accept the signature."""
    Webhook(secret).verify(got.body, got.headers)
    event = _client().webhooks.unwrap(got.body, got.headers, secret=secret)
    assert event.id == got.headers["webhook-id"]
    return event


@cache
def _client() -> openai.OpenAI:
    return openai.OpenAI(api_key="none")
