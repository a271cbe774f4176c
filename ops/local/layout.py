"""Where one stack keeps its things, and what it remembers between starts."""

import hashlib
import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field

LONGEST_SOCKET_PATH = 90
"""Bytes. The kernel takes 107 (103 on macOS), and supervisor binds under a longer temporary name first."""

PORTS = range(20_000, 32_000)
"""Below the range from which kernels give ports to outgoing connections, so that a remembered port stays free."""


class Layout:
    """The paths inside one `var/` folder."""

    def __init__(self, var: Path) -> None:
        self.var = var.resolve()
        self.logs = self.var / "log"
        self.postgres = self.var / "postgres"
        self.queue = self.var / "valkey-queue"
        self.cache = self.var / "valkey-cache"
        self.blobs = self.var / "blobs"
        self.memory = self.var / "stack.json"
        self.shell_file = self.var / "stack.env"
        self.lock = self.var / "stack.lock"
        self.supervisor_config = self.var / "supervisord.conf"
        self.supervisor_pid = self.var / "supervisord.pid"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def create(self) -> None:
        # Logs and data hold what people asked for.
        self.var.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.logs, self.blobs, self.queue, self.cache):
            folder.mkdir(exist_ok=True)

    def control_socket(self) -> Path:
        """Supervisor's socket: inside `var/` where its name is short enough, else in a private folder under /tmp."""
        inside = self.var / "supervisor.sock"
        if len(os.fsencode(inside)) <= LONGEST_SOCKET_PATH:
            return inside
        folder = self._private_temporary_folder()
        return folder / f"{hashlib.sha256(os.fsencode(self.var)).hexdigest()[:16]}.sock"

    @staticmethod
    def _private_temporary_folder() -> Path:
        name = f"afterimage-{os.geteuid()}"
        parents = [Path(tempfile.gettempdir()), Path("/tmp")]  # checked below  # nosec B108
        folder = next(p / name for p in parents if len(os.fsencode(p)) <= LONGEST_SOCKET_PATH - 50)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Anyone may create names in /tmp: a folder of someone else's would hand them control of the stack.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} must be a folder that only this user can open")
        return folder


class Memory(BaseModel):
    """Ports and passwords, chosen at the first start and kept in `var/stack.json`."""

    ports: dict[str, int] = Field(default_factory=dict)
    passwords: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def recall(cls, layout: Layout) -> Self:
        if layout.memory.exists():
            return cls.model_validate_json(layout.memory.read_bytes())
        return cls()

    def keep(self, layout: Layout) -> None:
        write_private(layout.memory, self.model_dump_json(indent=2) + "\n")

    def port(self, name: str) -> int:
        if name not in self.ports:
            self.ports[name] = free_port(excluding=set(self.ports.values()))
        return self.ports[name]

    def password(self, name: str) -> str:
        return self.passwords.setdefault(name, secrets.token_urlsafe(18))

    def forget_taken_ports(self) -> None:
        """Drop every port on which something else listens now. Call only while the stack is down."""
        self.ports = {name: port for name, port in self.ports.items() if is_free(port)}


def free_port(*, excluding: set[int]) -> int:
    """A port of 127.0.0.1 on which nothing listens, chosen at random so that two stacks starting together differ."""
    for _ in range(200):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        if port not in excluding and is_free(port):
            return port
    raise OSError(f"no free port found between {PORTS.start} and {PORTS.stop}")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections of the last run that still linger in TIME_WAIT do not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    unfinished.replace(path)
