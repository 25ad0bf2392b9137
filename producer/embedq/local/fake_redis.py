"""Serve fakeredis on a unix socket, for a trial where no Redis server is available.

python -P fake_redis.py SOCKET
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
    """The TCP server of fakeredis on a unix socket, with the faults that stop Celery mended."""

    address_family = socket.AF_UNIX
    request_queue_size = 128

    def __init__(self, path: str) -> None:
        super().__init__(path)  # type: ignore[arg-type]  # the address of a unix socket is a path
        self.daemon_threads = True
        self.RequestHandlerClass = _mended(self.RequestHandlerClass)
        self._numbers = itertools.count()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a client under a name of its own: on a unix socket all have the same address."""
        connection, _ = self.socket.accept()
        return connection, ("local", next(self._numbers))


def _mended(handler: Any) -> Any:
    class Handler(handler):  # type: ignore[misc]
        """Answers as a real server does (both measured with fakeredis 2.40)."""

        def setup(self) -> None:
            super().setup()
            # Its socket does not block, and a reply of more than the socket's buffer was lost.
            self.writer.writer = _PatientWriter(self.connection)
            # An error, NOSCRIPT for one, was answered and then the connection was closed.
            self.current_client.read_response = _returning_errors(self.current_client.read_response)

    return Handler


class _PatientWriter:
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
            # A traceback of Lua has lines, which no client expects in an error.
            return type(error)(" ".join(str(error).split()))

    return read_response


def main() -> None:
    """Serve until killed."""
    UnixFakeServer(sys.argv[1]).serve_forever()


if __name__ == "__main__":
    main()
