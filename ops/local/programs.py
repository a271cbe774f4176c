"""The programs of a stack, and their configuration for supervisor."""

import configparser
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Literal

from ops.local import postgres, valkey
from ops.local.layout import Layout, StackState
from shared.settings import Settings

APP_WAIT_S = 180
"""Loading the starter models from a cold disk on a busy laptop takes most of this time."""


@dataclass(frozen=True)
class Program:
    """One supervised process."""

    name: str
    command: list[str]
    group: Literal["servers", "app"] = "app"
    stop_signal: str = "TERM"
    start_wait_s: float = APP_WAIT_S
    """Longest time until it is ready."""
    stop_wait_s: int = 10
    environment: Mapping[str, str] = field(default_factory=dict)
    serves: tuple[str, str | None] | None = None
    """A worker's kind and generator, as it registers them in the database."""

    @property
    def full_name(self) -> str:
        """The name in supervisor."""
        return f"{self.group}:{self.name}"


def servers(layout: Layout) -> list[Program]:
    return [
        # SIGINT is the "fast" stop of Postgres, which ends sessions instead of waiting for them.
        Program("postgres", postgres.command(layout.postgres), group="servers", stop_signal="INT", stop_wait_s=30),
        Program("queue", valkey.command(layout.queue), group="servers"),
        Program("cache", valkey.command(layout.cache), group="servers"),
    ]


def app(
    settings: Settings, state: StackState, instances: Mapping[str, int], *, worker_module: str = "worker_service"
) -> list[Program]:
    """Return the processes of the product.

    Args:
        instances: number of processes by kind (`api`, `embed`, `generate`, `io`); 1 by default. The second process of a
            kind is named `api-2`, or for the generator `starter` `generate-starter-2`.
        worker_module: module that `python -m` runs as a worker; it takes the arguments of `worker_service`.
    """
    worker = partial(_worker, settings, state, worker_module)
    programs = [
        Program(
            name,
            _python("-m", "api_service"),
            stop_wait_s=15,  # the API gives running requests 10 s
            environment={"AFTERIMAGE_API__PORT": str(state.port(name))},
        )
        for name in _instance_names("api", instances.get("api", 1))
    ]
    programs += [
        worker(name, "embed", serves=("embed", None)) for name in _instance_names("embed", instances.get("embed", 1))
    ]
    programs += [
        worker(
            name,
            "generate",
            "--model",
            model,
            serves=("generate", model),
            # A model of many gigabytes takes longer than the starter. Its watchdog ends a worker that hangs.
            start_wait_s=settings.watchdog.load_s + settings.watchdog.warm_up_s,
        )
        for model in settings.model.generators
        for name in _instance_names(f"generate-{model}", instances.get("generate", 1))
    ]
    programs += [worker(name, "io", serves=("io", None)) for name in _instance_names("io", instances.get("io", 1))]
    reconciler = _python("-m", "worker_service", "reconciler")
    return [
        *programs,
        Program("reconciler", reconciler, environment=_metrics(state, "reconciler")),
        _flower(state),
    ]


def _worker(
    settings: Settings,
    state: StackState,
    module: str,
    name: str,
    *arguments: str,
    serves: tuple[str, str | None],
    start_wait_s: float = APP_WAIT_S,
) -> Program:
    return Program(
        name,
        _python("-m", module, *arguments),
        start_wait_s=start_wait_s,
        # The worker exits without cleanup 15 s after its grace time.
        stop_wait_s=int(settings.jobs.shutdown_grace_s) + 20,
        environment=_metrics(state, name),
        serves=serves,
    )


def _metrics(state: StackState, name: str) -> dict[str, str]:
    return {"AFTERIMAGE_METRICS__PORT": str(state.port(f"metrics-{name}"))}


def _flower(state: StackState) -> Program:
    return Program(
        "flower",
        _python("-m", "celery", "-A", "ops.flower.app", "flower"),
        environment={
            "FLOWER_ADDRESS": "127.0.0.1",
            "FLOWER_PORT": str(state.port("flower")),
            # In the environment, because every user of the machine can read command lines.
            "FLOWER_BASIC_AUTH": f"afterimage:{state.password('flower')}",
            "FLOWER_READ_ONLY": "true",
            # Flower keeps tasks in memory, about 6 KB each. Its default of 100,000 would need 600 MB.
            "FLOWER_MAX_TASKS": os.environ.get("FLOWER_MAX_TASKS", "5000"),
        },
    )


def _instance_names(name: str, count: int) -> list[str]:
    return [name if number == 1 else f"{name}-{number}" for number in range(1, count + 1)]


def _python(*arguments: str) -> list[str]:
    # Unbuffered, so that the last line before a crash is in the log.
    return [sys.executable, "-u", *arguments]


def supervisor_config(layout: Layout, programs: Iterable[Program], *, folder: str) -> str:
    """Return the text of supervisord.conf. No program starts automatically: the stack starts the groups in order."""
    programs = list(programs)
    socket = str(layout.control_socket())
    config = configparser.RawConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config["unix_http_server"] = {"file": _escape_percent(socket), "chmod": "0700"}
    config["supervisord"] = {
        "logfile": _escape_percent(str(layout.log("supervisord"))),
        "logfile_maxbytes": "1MB",
        "logfile_backups": "1",
        "pidfile": _escape_percent(str(layout.supervisor_pid)),
        "directory": _escape_percent(folder),
        "minfds": "1024",
        "nocleanup": "true",
    }
    config["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    # Supervisor stops the group with the highest priority first: the product before its servers.
    for priority, group in enumerate(("servers", "app"), start=1):
        members = [program.name for program in programs if program.group == group]
        if members:
            config[f"group:{group}"] = {"programs": ",".join(members), "priority": str(priority)}
    for program in programs:
        config[f"program:{program.name}"] = _section(layout, program)
    text = StringIO()
    config.write(text)
    return text.getvalue()


def _section(layout: Layout, program: Program) -> dict[str, str]:
    return {
        "command": _escape_percent(shlex.join(program.command)),
        "environment": ",".join(f'{name}="{_escape_percent(value)}"' for name, value in program.environment.items()),
        "autostart": "false",
        "autorestart": "true",
        "startsecs": "1",
        # Supervisor waits one second longer after each early exit, so 100 retries take more than an hour.
        "startretries": "100",
        "stopsignal": program.stop_signal,
        "stopwaitsecs": str(program.stop_wait_s),
        # When a server that forks (Granian) is killed, its children must be killed too.
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": _escape_percent(str(layout.log(program.name))),
        "stdout_logfile_maxbytes": "5MB",
        "stdout_logfile_backups": "2",
    }


def _escape_percent(value: str) -> str:
    """Escape `%`, which starts an expansion in supervisor's configuration."""
    return value.replace("%", "%%")
