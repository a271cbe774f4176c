"""The files of one stack, and the state that it keeps between starts."""

import hashlib
import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field

MAX_SOCKET_PATH_BYTES = 90
"""The kernel permits 107 bytes (103 on macOS), and supervisor first binds to a longer temporary name."""

PORTS = range(20_000, 32_000)
"""Below the range that kernels use for outgoing connections, so that a saved port stays free."""


class Layout:
    """The paths inside one `var/` folder."""

    def __init__(self, var: Path) -> None:
        self.var = var.resolve()
        self.logs = self.var / "log"
        self.postgres = self.var / "postgres"
        self.queue = self.var / "valkey-queue"
        self.cache = self.var / "valkey-cache"
        self.blobs = self.var / "blobs"
        self.state_file = self.var / "stack.json"
        self.shell_file = self.var / "stack.env"
        self.lock = self.var / "stack.lock"
        self.supervisor_config = self.var / "supervisord.conf"
        self.supervisor_pid = self.var / "supervisord.pid"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def create(self) -> None:
        # Private, because logs and data contain the prompts of users.
        self.var.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.logs, self.blobs, self.queue, self.cache):
            folder.mkdir(exist_ok=True)

    def control_socket(self) -> Path:
        """Return the path of supervisor's socket: in `var/` if it is short enough, else in a private folder in /tmp."""
        inside = self.var / "supervisor.sock"
        if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
            return inside
        folder = self._private_temporary_folder()
        return folder / f"{hashlib.sha256(os.fsencode(self.var)).hexdigest()[:16]}.sock"

    @staticmethod
    def _private_temporary_folder() -> Path:
        name = f"afterimage-{os.geteuid()}"
        parents = [Path(tempfile.gettempdir()), Path("/tmp")]  # checked below  # nosec B108
        folder = next(p / name for p in parents if len(os.fsencode(p)) <= MAX_SOCKET_PATH_BYTES - 50)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Any user may create folders in /tmp. The owner of this folder controls the stack, so it must be ours.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} must be a folder that only this user can open")
        return folder


class StackState(BaseModel):
    """Ports and passwords, chosen at the first start and saved in `var/stack.json`."""

    ports: dict[str, int] = Field(default_factory=dict)
    passwords: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def load(cls, layout: Layout) -> Self:
        if layout.state_file.exists():
            return cls.model_validate_json(layout.state_file.read_bytes())
        return cls()

    def save(self, layout: Layout) -> None:
        write_private(layout.state_file, self.model_dump_json(indent=2) + "\n")

    def port(self, name: str) -> int:
        if name not in self.ports:
            self.ports[name] = free_port(excluding=set(self.ports.values()))
        return self.ports[name]

    def password(self, name: str) -> str:
        return self.passwords.setdefault(name, secrets.token_urlsafe(18))

    def drop_taken_ports(self) -> None:
        """Drop every port on which another process listens. Call only while the stack is down."""
        self.ports = {name: port for name, port in self.ports.items() if is_free(port)}


def free_port(*, excluding: set[int]) -> int:
    """Return a free port of 127.0.0.1, chosen at random so that two stacks that start together differ.

    Raises:
        OSError: 200 random ports were in use.
    """
    for _ in range(200):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        if port not in excluding and is_free(port):
            return port
    raise OSError(f"no free port found between {PORTS.start} and {PORTS.stop}")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections of the last run in TIME_WAIT do not count as in use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """Atomically write a file that only its owner may read."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    unfinished.replace(path)
