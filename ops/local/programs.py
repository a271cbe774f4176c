"""What runs in a stack, and how supervisor is told."""

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
from ops.local.layout import Layout, Memory
from shared.settings import Settings


@dataclass(frozen=True)
class Program:
    """One supervised process."""

    name: str
    command: list[str]
    group: Literal["servers", "app"] = "app"
    stop_signal: str = "TERM"
    stop_wait_s: int = 10
    environment: Mapping[str, str] = field(default_factory=dict)
    serves: tuple[str, str | None] | None = None
    """A worker's kind and generator, as it announces them in the database."""

    @property
    def full_name(self) -> str:
        """As supervisor calls it."""
        return f"{self.group}:{self.name}"


def servers(layout: Layout) -> list[Program]:
    return [
        # SIGINT is Postgres's "fast" stop: it ends sessions instead of waiting for them.
        Program("postgres", postgres.command(layout.postgres), group="servers", stop_signal="INT", stop_wait_s=30),
        Program("queue", valkey.command(layout.queue), group="servers"),
        Program("cache", valkey.command(layout.cache), group="servers"),
    ]


def app(
    settings: Settings, memory: Memory, instances: Mapping[str, int], *, worker_module: str = "worker_service"
) -> list[Program]:
    """The product's own processes.

    Args:
        instances: how many of a kind (`api`, `embed`, `generate`, `io`), one each where it says nothing. The second
            of a kind is called `api-2`, of the generator `starter` `generate-starter-2`.
        worker_module: what `python -m` runs as a worker; takes the arguments of `worker_service`.
    """
    worker = partial(_worker, settings, memory, worker_module)
    programs = [
        Program(
            name,
            _python("-m", "api_service"),
            stop_wait_s=15,  # it gives its own requests 10 s
            environment={"AFTERIMAGE_API__PORT": str(memory.port(name))},
        )
        for name in _numbered("api", instances.get("api", 1))
    ]
    programs += [
        worker(name, "embed", serves=("embed", None)) for name in _numbered("embed", instances.get("embed", 1))
    ]
    programs += [
        worker(name, "generate", "--model", model, serves=("generate", model))
        for model in settings.model.generators
        for name in _numbered(f"generate-{model}", instances.get("generate", 1))
    ]
    programs += [worker(name, "io", serves=("io", None)) for name in _numbered("io", instances.get("io", 1))]
    reconciler = _python("-m", "worker_service", "reconciler")
    return [
        *programs,
        Program("reconciler", reconciler, environment=_metrics(memory, "reconciler")),
        _flower(memory),
    ]


def _worker(
    settings: Settings, memory: Memory, module: str, name: str, *arguments: str, serves: tuple[str, str | None]
) -> Program:
    return Program(
        name,
        _python("-m", module, *arguments),
        # The worker ends itself hard 15 s after its grace time.
        stop_wait_s=int(settings.jobs.shutdown_grace_s) + 20,
        environment=_metrics(memory, name),
        serves=serves,
    )


def _metrics(memory: Memory, name: str) -> dict[str, str]:
    return {"AFTERIMAGE_METRICS__PORT": str(memory.port(f"metrics-{name}"))}


def _flower(memory: Memory) -> Program:
    return Program(
        "flower",
        _python("-m", "celery", "-A", "ops.flower.app", "flower"),
        environment={
            "FLOWER_ADDRESS": "127.0.0.1",
            "FLOWER_PORT": str(memory.port("flower")),
            # By environment, because everyone on the machine may read a command line.
            "FLOWER_BASIC_AUTH": f"afterimage:{memory.password('flower')}",
            "FLOWER_READ_ONLY": "true",
            # It keeps each in memory, some 6 KB; its own 100,000 would never stop growing.
            "FLOWER_MAX_TASKS": os.environ.get("FLOWER_MAX_TASKS", "5000"),
        },
    )


def _numbered(name: str, count: int) -> list[str]:
    return [name if number == 1 else f"{name}-{number}" for number in range(1, count + 1)]


def _python(*arguments: str) -> list[str]:
    # Unbuffered, so that the last line before a crash is in the log.
    return [sys.executable, "-u", *arguments]


def supervisor_config(layout: Layout, programs: Iterable[Program], *, folder: str) -> str:
    """The text of supervisord.conf. Nothing starts by itself: the stack starts the groups in order."""
    programs = list(programs)
    socket = str(layout.control_socket())
    config = configparser.RawConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config["unix_http_server"] = {"file": _literal(socket), "chmod": "0700"}
    config["supervisord"] = {
        "logfile": _literal(str(layout.log("supervisord"))),
        "logfile_maxbytes": "1MB",
        "logfile_backups": "1",
        "pidfile": _literal(str(layout.supervisor_pid)),
        "directory": _literal(folder),
        "minfds": "1024",
        "nocleanup": "true",
    }
    config["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    # Groups are stopped from the highest priority down: the product before its servers.
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
        "command": _literal(shlex.join(program.command)),
        "environment": ",".join(f'{name}="{_literal(value)}"' for name, value in program.environment.items()),
        "autostart": "false",
        "autorestart": "true",
        "startsecs": "1",
        # Supervisor waits one second longer after each quick death, so this goes on for hours, not for ever.
        "startretries": "100",
        "stopsignal": program.stop_signal,
        "stopwaitsecs": str(program.stop_wait_s),
        # A server that forks (Granian) must not leave its children behind when it has to be killed.
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": _literal(str(layout.log(program.name))),
        "stdout_logfile_maxbytes": "5MB",
        "stdout_logfile_backups": "2",
    }


def _literal(value: str) -> str:
    """`%` starts an expansion in supervisor's file."""
    return value.replace("%", "%%")
