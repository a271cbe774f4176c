"""Control the processes of a running stack by name, through supervisor's XML-RPC interface."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Any, NamedTuple
from xmlrpc.client import Fault, ServerProxy  # only to our own supervisor, over its socket  # nosec B411

import psutil
from supervisor.xmlrpc import SupervisorTransport

from ops.local.layout import Layout


class ProcessState(NamedTuple):
    full_name: str
    state: str
    """Supervisor's state name: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL or UNKNOWN."""
    pid: int | None
    log: str


class Control:
    """Starts, stops and signals the processes of one stack. Any process may use it, not only the one that started it.

    Names are those of `states()`: `postgres`, `queue`, `cache`, `api`, `embed`, `generate-<model>`, `reconciler`, ...

    Raises (all methods but `is_running`):
        ConnectionError, FileNotFoundError: the stack does not run.
        KeyError: the stack has no process of that name.
        ProcessLookupError, xmlrpc.client.Fault: the process does not run, or already runs.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def is_running(self) -> bool:
        try:
            with self._supervisor() as supervisor:
                supervisor.getState()
        except (ConnectionError, FileNotFoundError):
            return False
        return True

    def supervisor_pid(self) -> int:
        with self._supervisor() as supervisor:
            return int(supervisor.getPID())

    def states(self) -> dict[str, ProcessState]:
        with self._supervisor() as supervisor:
            found = supervisor.getAllProcessInfo()
        return {
            process["name"]: ProcessState(
                full_name=f"{process['group']}:{process['name']}",
                state=process["statename"],
                pid=process["pid"] or None,
                log=process["stdout_logfile"],
            )
            for process in found
        }

    def pid(self, name: str) -> int | None:
        return self.states()[name].pid

    def start(self, name: str) -> None:
        """Start a stopped process and wait until it has run for a second."""
        with self._supervisor() as supervisor:
            supervisor.startProcess(self.states()[name].full_name)

    def start_group(self, group: str) -> None:
        """Start every process of the group `servers` or `app`, without waiting."""
        with self._supervisor() as supervisor:
            supervisor.startProcessGroup(group, False)

    def stop(self, name: str) -> None:
        """Stop a process; kill it after its stop timeout. Supervisor does not start it again."""
        with self._supervisor() as supervisor:
            supervisor.stopProcess(self.states()[name].full_name)

    def signal(self, name: str, number: Signals) -> None:
        """Send a signal. Supervisor starts the process again if the signal ends it."""
        with self._supervisor() as supervisor:
            supervisor.signalProcess(self.states()[name].full_name, str(int(number)))

    def kill(self, name: str) -> None:
        self.signal(name, SIGKILL)

    def freeze(self, name: str) -> None:
        """Send SIGSTOP to a process and its descendants, such as the sessions of a server."""
        self._signal_tree(name, SIGSTOP)

    def thaw(self, name: str) -> None:
        self._signal_tree(name, SIGCONT)

    def _signal_tree(self, name: str, number: Signals) -> None:
        pid = self.pid(name)
        if pid is None:
            raise ProcessLookupError(f"{name} does not run")
        _signal(psutil.Process(pid), number)

    def shut_down(self) -> int:
        """Let supervisor stop all processes and then itself; return its process id without waiting."""
        with self._supervisor() as supervisor:
            pid = int(supervisor.getPID())
            _signal(psutil.Process(pid), SIGCONT)  # a frozen process does not handle SIGTERM
            try:
                supervisor.shutdown()
            except Fault as fault:
                if "SHUTDOWN_STATE" not in fault.faultString:  # another process has already requested the shutdown
                    raise
        return pid

    @contextmanager
    def _supervisor(self) -> Iterator[Any]:
        transport = SupervisorTransport(serverurl=f"unix://{self.layout.control_socket()}")
        with ServerProxy("http://localhost", transport=transport) as proxy:
            yield proxy.supervisor


def _signal(process: psutil.Process, number: Signals) -> None:
    """Send a signal to a process and its descendants."""
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(number)
