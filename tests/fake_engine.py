"""An engine with OpenAI's image calls, as a real HTTP server on loopback. Its images are blocks of colour.

`python -m tests.fake_engine PORT SECONDS` runs one as a process of its own, which draws each image in that time.
"""

import base64
import hashlib
import io
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flask import Flask, Response, jsonify, request
from PIL import Image
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Any
"""The result of a view of Flask."""


class Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...


@dataclass(frozen=True)
class Drawing:
    """One call that an engine got."""

    path: str
    fields: dict[str, Any]
    headers: dict[str, str]
    pictures: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.fields["size"].split("x")
        return int(width), int(height)


class FakeEngine:
    """`paint` returns the pixels of a call, and `answer` the whole answer. A test replaces either."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.drawings: list[Drawing] = []
        self.checks = 0
        """Calls of `GET /models`."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.closed = threading.Event()
        """Set when a client has closed its connection before its image was drawn."""
        self.released = threading.Event()
        """Ends the wait of `until_released`."""
        self.url = ""
        self._lock = threading.Lock()
        self.paint: Callable[[Drawing], np.ndarray] = blocks
        self.answer: Callable[[Drawing], Answer] = self.draw

    def draw(self, drawing: Drawing) -> Answer:
        """The answer of an honest engine, after `seconds`."""
        self.wait(self.seconds)
        return picture_answer(self.paint(drawing))

    def until_released(self, drawing: Drawing) -> Answer:
        """Draw when `released` is set."""
        self.wait(60, self.released)
        return picture_answer(self.paint(drawing))

    def wait(self, seconds: float, event: threading.Event | None = None) -> None:
        """Wait as an engine that computes, and notice a client that goes away."""
        connection = request.environ["werkzeug.socket"]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (event is not None and event.is_set()):
            if is_closed(connection):
                self.closed.set()
                return
            time.sleep(0.002)

    def app(self) -> Flask:
        app = Flask("engine")

        @app.get("/v1/models")
        def models() -> Answer:
            self.checks += 1
            return jsonify(data=[{"id": "painter"}])

        @app.post("/v1/images/<call>")
        def images(call: str) -> Answer:
            fields = request.get_json() if request.is_json else request.form.to_dict()
            pictures = [file.read() for name in ("image", "image[]") for file in request.files.getlist(name)]
            drawing = Drawing(f"images/{call}", fields, dict(request.headers), pictures)
            with self._lock:
                self.drawings.append(drawing)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                return self.answer(drawing)
            finally:
                with self._lock:
                    self.in_flight -= 1

        return app

    @contextmanager
    def serving(self, port: int = 0) -> Iterator["FakeEngine"]:
        """Serve on loopback until the end of the block. A port of 0 is a free one."""
        server = make_server("127.0.0.1", port, self.app(), threaded=True, request_handler=Quiet)
        server.daemon_threads = True  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            thread.join()
            server.server_close()


def is_closed(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


def blocks(drawing: Drawing) -> np.ndarray:
    """4 x 4 blocks of colour that depend on every input of the image: uint8, shape (height, width, 3)."""
    fields = drawing.fields
    digest = hashlib.sha256(repr([fields["prompt"], int(fields.get("seed") or 0), *drawing.pictures]).encode())
    colours = np.random.default_rng(list(digest.digest())).integers(1, 255, (4, 4, 3), dtype=np.uint8)
    width, height = drawing.size
    return colours[(np.arange(height) * 4 // height)[:, None], (np.arange(width) * 4 // width)[None, :]]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture_answer(pixels: np.ndarray) -> Answer:
    return jsonify(created=0, data=[{"b64_json": base64.b64encode(png(pixels)).decode(), "url": None}])


def image_in(answer: Any) -> np.ndarray:
    """The image in the answer of an engine: uint8, shape (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))


def error_answer(status: int, code: str | None = None, **headers: str) -> Response:
    response = jsonify(error={"message": "no", "type": "some_error", "code": code})
    response.status_code = status
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return response


if __name__ == "__main__":
    engine = FakeEngine(seconds=float(sys.argv[2]))
    with engine.serving(int(sys.argv[1])):
        threading.Event().wait()
