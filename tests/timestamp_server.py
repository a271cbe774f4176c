"""A small RFC 3161 time stamp service: `openssl ts` behind an HTTP server."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.signing_certificates import make_signing_files

OPENSSL = shutil.which("openssl")
CONFIGURATION = """\
[tsa]
serial = {folder}/serial
signer_cert = {certificate}
certs = {issuer}
signer_key = {key}
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
"""


@dataclass(frozen=True)
class TimestampServer:
    """url: of the service. issuer: PEM file with the issuer of its certificate. asked: the requests so far."""

    url: str
    issuer: Path
    asked: list[bytes]


@contextmanager
def timestamp_server(folder: Path) -> Iterator[TimestampServer]:
    """Run the service until the end of the block. folder: for its certificate."""
    files = make_signing_files(folder, uses=(ExtendedKeyUsageOID.TIME_STAMPING,))
    configuration, query = folder / "tsa.cnf", folder / "query"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder, certificate=files.certificate_chain, issuer=files.issuer, key=files.private_key
        )
    )
    (folder / "serial").write_text("01")
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query.read_bytes())
            command = [OPENSSL or "openssl", "ts", "-reply", "-section", "tsa"]
            reply = subprocess.run(
                [*command, "-config", configuration, "-queryfile", query], check=True, capture_output=True
            ).stdout
            self.send_response(200)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield TimestampServer(f"http://127.0.0.1:{server.server_port}/", files.issuer, asked)
        finally:
            server.shutdown()
            thread.join()
