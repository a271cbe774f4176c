"""A second machine: a network namespace, which a cable of two virtual interfaces connects to this one.

Making one needs root and `ip` of iproute2.
"""

import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ops.local.stack import REPOSITORY
from tests.other_servers import running
from tests.stack import clean_environment

INTERFACE = "cable"
UNKNOWN_HARDWARE = "02:00:00:00:00:01"


class OtherMachine:
    """A machine that reaches only this one, at the address `here`, and that this one reaches as `there`."""

    def __init__(self) -> None:
        number = secrets.randbelow(2**16)
        self.name = f"machine-{number:04x}"
        self._near = f"cable-{number:04x}"
        # Reserved for tests of networks: https://www.rfc-editor.org/rfc/rfc2544, appendix C.2.2.
        network = f"198.18.{number // 256}.{number % 256 // 4 * 4}".rpartition(".")
        first = int(network[2])
        self.here, self.there = f"{network[0]}.{first + 1}", f"{network[0]}.{first + 2}"

    @contextmanager
    def connected(self) -> Iterator["OtherMachine"]:
        """Make the machine and its cable. Both disappear at the end of the block."""
        _ip("netns", "add", self.name)
        try:
            far = ("peer", "name", INTERFACE, "netns", self.name)
            _ip("link", "add", self._near, "type", "veth", *far)
            _ip("address", "add", f"{self.here}/30", "dev", self._near)
            _ip("link", "set", self._near, "up")
            self._ip("address", "add", f"{self.there}/30", "dev", INTERFACE)
            self._ip("link", "set", "lo", "up")
            self._ip("link", "set", INTERFACE, "up")
            yield self
        finally:
            _ip("netns", "delete", self.name)

    def running(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> AbstractContextManager["subprocess.Popen[bytes]"]:
        """Run a program of the product on the machine, with these settings, until the block ends."""
        return running(
            ["ip", "netns", "exec", self.name, *command],
            log,
            environment={**clean_environment(), **environment},
            folder=REPOSITORY,
        )

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Take the machine's interface down. Its programs get an error at their next call."""
        self._ip("link", "set", INTERFACE, "down")
        try:
            yield
        finally:
            self._ip("link", "set", INTERFACE, "up")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Lose every packet in both directions. Neither side gets an error: it only waits."""
        # Packets go to hardware that does not exist, so the other side ignores them.
        _ip("neighbour", "replace", self.there, "lladdr", UNKNOWN_HARDWARE, "dev", self._near, "nud", "permanent")
        self._ip("neighbour", "replace", self.here, "lladdr", UNKNOWN_HARDWARE, "dev", INTERFACE, "nud", "permanent")
        try:
            yield
        finally:
            _ip("neighbour", "delete", self.there, "dev", self._near)
            self._ip("neighbour", "delete", self.here, "dev", INTERFACE)

    def _ip(self, *arguments: str) -> None:
        _ip("-netns", self.name, *arguments)


def can_be_made() -> bool:
    """Whether this process may make another machine."""
    if os.geteuid():
        return False
    name = f"probe-{secrets.token_hex(4)}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
