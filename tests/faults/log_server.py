"""An event log in a process of its own, behind a Unix socket. It may be killed at any moment and is back at once.

    python -m tests.faults.log_server DIRECTORY

serves DIRECTORY/events.db on DIRECTORY/socket.

Each message, in either direction, is a length (4 bytes, big-endian) and a pickle. A request is (method, arguments) of
EventLog; the response is the result or the exception. On a new connection the server first sends its process id.
"""

import asyncio
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from events import sqlite
from events.log import EventLog, LogUnavailable
from events.sqlite import SqliteStore
from tests.faults.immortal import back_at_once

STRIDE = 512
"""Part of the schema: every process that opens its log must set the same."""
_LENGTH = struct.Struct(">I")


async def _serve(directory: Path) -> None:
    sqlite._STRIDE = STRIDE
    log = EventLog(SqliteStore(directory / "events.db"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        send(writer, os.getpid())
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                method, arguments = await receive(reader)
                try:
                    result = await getattr(log, method)(*arguments)
                except Exception as error:  # noqa: BLE001  -- the client raises it
                    result = error
                send(writer, result)
                await writer.drain()

    (directory / "socket").unlink(missing_ok=True)
    async with await asyncio.start_unix_server(answer, directory / "socket"):
        await asyncio.Future()


def send(writer: asyncio.StreamWriter, message: object) -> None:
    data = pickle.dumps(message)
    writer.write(_LENGTH.pack(len(data)) + data)


async def receive(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))  # noqa: S301  -- from our own process


class Client:
    """One connection. If it breaks during a call, the call is repeated with the same arguments until it is answered."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "socket"
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.retries = 0
        self.pid = 0

    async def call(self, method: str, *arguments: object) -> Any:
        while True:
            try:
                reader, writer = self._connection or await self._connect()
                send(writer, (method, arguments))
                result = await receive(reader)
            except (asyncio.IncompleteReadError, OSError):
                self._connection = None
                self.retries += 1
                await asyncio.sleep(0.005)
                continue
            if isinstance(result, LogUnavailable):
                self.retries += 1
                continue
            if isinstance(result, Exception):
                raise result
            return result

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, _ = self._connection = await asyncio.open_unix_connection(self._socket)
        self.pid = await receive(reader)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection[1].close()


if __name__ == "__main__":
    back_at_once(_serve)
