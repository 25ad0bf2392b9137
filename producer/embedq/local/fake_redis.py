"""Server of fakeredis on a unix socket, for trial on machines without a Redis server.

Usage: python -P fake_redis.py SOCKET
"""

from __future__ import annotations

import itertools
import select
import socket
import sys
from typing import Any

import fakeredis
from redis.exceptions import ResponseError


class UnixFakeServer(fakeredis.TcpFakeServer):
    """Runs the TCP server of fakeredis on a unix socket, with fixes for Celery."""

    address_family = socket.AF_UNIX
    request_queue_size = 128

    def __init__(self, path: str) -> None:
        super().__init__(path)  # type: ignore[arg-type]  # a unix socket has a path as address
        self.daemon_threads = True
        self.RequestHandlerClass = _fixed(self.RequestHandlerClass)
        self._client_ids = itertools.count()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a client with a unique address, which clients of a unix socket lack."""
        connection, _ = self.socket.accept()
        return connection, ("local", next(self._client_ids))


def _fixed(handler: Any) -> Any:
    class Handler(handler):  # type: ignore[misc]
        def setup(self) -> None:
            super().setup()
            # fakeredis writes to a non-blocking socket and loses what exceeds its buffer.
            self.writer.writer = _BlockingWriter(self.connection)
            # fakeredis closes the connection after an error reply such as NOSCRIPT.
            self.current_client.read_response = _returning_errors(self.current_client.read_response)

    return Handler


class _BlockingWriter:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._connection.send(rest) :]
            except BlockingIOError:
                select.select([], [self._connection], [])

    def flush(self) -> None: ...


def _returning_errors(read: Any) -> Any:
    def read_response() -> Any:
        try:
            return read()
        except ResponseError as error:
            # A Lua traceback has several lines, but an error reply must have one.
            return type(error)(" ".join(str(error).split()))

    return read_response


if __name__ == "__main__":
    UnixFakeServer(sys.argv[1]).serve_forever()
