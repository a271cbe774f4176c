"""The processes of a running stack by name, through supervisor's own interface."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Any, NamedTuple
from xmlrpc.client import Fault, ServerProxy  # of our own supervisor, over its socket  # nosec B411

import psutil
from supervisor.xmlrpc import SupervisorTransport

from ops.local.layout import Layout


class ProcessState(NamedTuple):
    full_name: str
    state: str
    """Supervisor's word: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL or UNKNOWN."""
    pid: int | None
    log: str


class Control:
    """Starts, stops and signals the processes of one stack. Any process may use it, not only the one that started it.

    Names are those of `states()`: `postgres`, `queue`, `cache`, `api`, `embed`, `generate-<model>`, `reconciler`, ...

    Raises (all methods but `is_running`):
        ConnectionError, FileNotFoundError: the stack does not run.
        KeyError: no process has that name.
        ProcessLookupError, xmlrpc.client.Fault: the process does not run, or runs already.
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

    def begin_group(self, group: str) -> None:
        """Start every process of `servers` or `app` and do not wait."""
        with self._supervisor() as supervisor:
            supervisor.startProcessGroup(group, False)

    def stop(self, name: str) -> None:
        """Ask a process to end, kill it when it does not, and leave it stopped."""
        with self._supervisor() as supervisor:
            supervisor.stopProcess(self.states()[name].full_name)

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)

    def signal(self, name: str, number: Signals) -> None:
        """Send a signal behind supervisor's back: a process that ends by it is started again."""
        with self._supervisor() as supervisor:
            supervisor.signalProcess(self.states()[name].full_name, str(int(number)))

    def kill(self, name: str) -> None:
        self.signal(name, SIGKILL)

    def freeze(self, name: str) -> None:
        """Stop a process where it stands, with every process it has started: a server's sessions freeze with it."""
        self._signal_tree(name, SIGSTOP)

    def thaw(self, name: str) -> None:
        self._signal_tree(name, SIGCONT)

    def _signal_tree(self, name: str, number: Signals) -> None:
        pid = self.pid(name)
        if pid is None:
            raise ProcessLookupError(f"{name} does not run")
        _signal(psutil.Process(pid), number)

    def shut_down(self) -> int:
        """Ask supervisor to stop everything and then itself; returns its process id at once."""
        with self._supervisor() as supervisor:
            pid = int(supervisor.getPID())
            _signal(psutil.Process(pid), SIGCONT)  # what is frozen would ignore SIGTERM
            try:
                supervisor.shutdown()
            except Fault as fault:
                if "SHUTDOWN_STATE" not in fault.faultString:  # somebody else asked already
                    raise
        return pid

    @contextmanager
    def _supervisor(self) -> Iterator[Any]:
        transport = SupervisorTransport(serverurl=f"unix://{self.layout.control_socket()}")
        with ServerProxy("http://localhost", transport=transport) as proxy:
            yield proxy.supervisor


def _signal(process: psutil.Process, number: Signals) -> None:
    """Send a signal to a process and to all that it has started."""
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(number)
