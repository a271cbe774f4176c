"""A webhook receiver: a small HTTP server that keeps every delivery and can stop answering, or answer without end."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson


@dataclass(frozen=True)
class Receipt:
    """One delivery that was answered with 204."""

    headers: dict[str, str]
    body: bytes

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> tuple[str, int]:
        """The job id and seq of the event."""
        data: dict[str, Any] = orjson.loads(self.body)["data"]
        return data["job_id"], data["seq"]


@dataclass
class Receiver:
    port: int
    receipts: list[Receipt] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)
    """While it is cleared, deliveries wait. They end without an answer when it is set."""
    pause_s: float = 0
    """Seconds before each answer."""
    drips: threading.Event = field(default_factory=threading.Event)
    """While it is set, each answer comes byte by byte and does not end."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @contextmanager
    def dripping(self) -> Iterator[None]:
        self.drips.set()
        try:
            yield
        finally:
            self.drips.clear()


@contextmanager
def receiving() -> Iterator[Receiver]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    _Handler.receiver = receiver = Receiver(server.server_port)
    receiver.answers.set()
    thread = threading.Thread(target=server.serve_forever, name="receiver")
    thread.start()
    try:
        yield receiver
    finally:
        receiver.answers.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if not self.receiver.answers.is_set():
            self.receiver.answers.wait()
            self.close_connection = True
            return
        if self.receiver.drips.is_set():
            self._drip()
            return
        threading.Event().wait(self.receiver.pause_s)
        self.receiver.receipts.append(Receipt({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(204)
        self.end_headers()

    def _drip(self) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 204 No Content\r\nX-Drip: ")
        with suppress(OSError):  # the client has closed the connection
            while self.receiver.drips.is_set():
                self.wfile.write(b"x")
                threading.Event().wait(0.2)

    def log_message(self, *_: Any) -> None:
        """Log nothing. Requests of killed workers would fill the output."""
