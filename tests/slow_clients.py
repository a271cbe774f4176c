"""Slow HTTP clients: real connections, driven by one thread."""

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.stack import wait_until

DRIP_S = 0.1


@dataclass
class SlowClient:
    """One connection. It sends `at_once`, then `slowly` byte by byte, and reads byte by byte if `reads`."""

    at_once: bytes = b""
    slowly: bytes = b""
    reads: bool = False
    connection: socket.socket | None = None
    sent: int = 0
    answer: bytearray = field(default_factory=bytearray)

    def connect(self, address: tuple[str, int]) -> None:
        made = self.connection = socket.socket()
        if self.reads:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the rest waits at the server
        made.settimeout(20)
        made.connect(address)
        made.sendall(self.at_once)
        made.setblocking(False)
        self.sent = 0

    def go_on(self) -> bool:
        """Send or read one byte. False when the server has closed the connection."""
        assert self.connection is not None
        try:
            if self.sent < len(self.slowly):
                self.sent += self.connection.send(self.slowly[self.sent : self.sent + 1])
            got = self.connection.recv(1 if self.reads else 65536)
            self.answer += got
            return bool(got)
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()


class Crowd:
    """Slow clients that stay connected until the block ends.

    reconnect: a client connects again when the server has closed its connection.
    `disconnects` counts how often the server closed a connection.
    """

    def __init__(self, url: str, clients: Sequence[SlowClient], *, reconnect: bool = False) -> None:
        parts = urlsplit(url)
        self._address = (str(parts.hostname), int(parts.port or 80))
        self._clients = clients
        self._reconnect = reconnect
        self._over = threading.Event()
        self.disconnects = 0
        self._thread = threading.Thread(target=self._drive)

    def __enter__(self) -> "Crowd":
        for client in self._clients:
            client.connect(self._address)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for client in self._clients:
            client.close()

    def _drive(self) -> None:
        staying = list(self._clients)
        while not self._over.wait(DRIP_S):
            for client in list(staying):
                if client.go_on():
                    continue
                self.disconnects += 1
                client.close()
                if self._reconnect:
                    client.connect(self._address)
                else:
                    staying.remove(client)


def silent() -> SlowClient:
    return SlowClient()


def slow_head(path: str) -> SlowClient:
    return SlowClient(slowly=_head("GET", path) + b"X-Padding: " + b"x" * 10_000)


def slow_body(path: str, *, length: int = 10_000) -> SlowClient:
    head = _head("POST", path, f"Content-Type: application/json\r\nContent-Length: {length}\r\n")
    return SlowClient(at_once=head + b"\r\n", slowly=b'{"prompt": "' + b"x" * (length - 12))


def slow_reader(path: str) -> SlowClient:
    return SlowClient(at_once=_head("GET", path) + b"\r\n", reads=True)


def open_stream(path: str) -> SlowClient:
    return SlowClient(at_once=_head("GET", path, "Accept: text/event-stream\r\n") + b"\r\n")


def wait_for_answers(clients: Sequence[SlowClient], matches: Callable[[bytes], bool], *, timeout_s: float) -> None:
    wait_until(
        lambda: all(matches(bytes(client.answer)) for client in clients),
        timeout_s=timeout_s,
        what="an answer to every client",
    )


def _head(method: str, path: str, fields: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}".encode()
