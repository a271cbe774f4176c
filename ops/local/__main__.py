"""The command `python -m ops.local up | run [-- COMMAND...] | down | status` for the local stack."""

import argparse
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ops.local.stack import REPOSITORY, AlreadyRunningError, LocalStack, StackError
from shared.errors import ConfigurationError

KINDS = ("api", "embed", "generate", "io")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    arguments = _arguments(sys.argv[1:])
    stack = LocalStack(arguments.var)
    try:
        return int(_COMMANDS[arguments.command](stack, arguments))
    except (StackError, ConfigurationError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def up(stack: LocalStack, arguments: argparse.Namespace) -> int:
    """Start the stack in the background and print its addresses."""
    try:
        stack.start(**_options(arguments))
    except AlreadyRunningError:
        print("Already running.")
    print(addresses(stack))
    return 0


def run(stack: LocalStack, arguments: argparse.Namespace) -> int:
    """Start the stack in the foreground until Ctrl-C or SIGTERM, or until a command ends.

    The environment of the command has the stack's settings and AFTERIMAGE_URL. If a stack already runs, a command uses
    it and leaves it running; without a command that is an error.
    """
    if arguments.program and stack.is_up:
        return _call(stack, arguments.program)
    for number in STOP_SIGNALS:
        # Also SIGINT: shells start background commands with SIGINT ignored, and it must still stop the stack.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        stack.start(attached=True, **_options(arguments))
        if arguments.program:
            return _call(stack, arguments.program)
        print(addresses(stack), flush=True)
        stack.wait_until_stopped()
    except KeyboardInterrupt:
        print("Stopping ...", flush=True)
        return 130 if arguments.program else 0
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stop
        stack.stop()
    return 0


def _call(stack: LocalStack, program: list[str]) -> int:
    environment = {**os.environ, **stack.environment(), "AFTERIMAGE_URL": stack.url}
    return subprocess.run(program, env=environment, check=False).returncode


def down(stack: LocalStack, _arguments: argparse.Namespace) -> int:
    stack.stop()
    print("Stopped.")
    return 0


def status(stack: LocalStack, _arguments: argparse.Namespace) -> int:
    if not stack.control.is_running():
        print("Not running.")
        return 3
    for name, process in stack.control.states().items():
        print(f"{name:<24} {process.state:<9} {process.pid or ''}")
    return 0


def addresses(stack: LocalStack) -> str:
    lines = [
        f"  Logs      {stack.layout.logs}",
        f"  For curl and scripts:  set -a; . {stack.layout.shell_file}; set +a",
    ]
    if "api" not in stack.control.states():
        return "\n".join(["The servers are running.", *lines])
    user, password = stack.flower_login
    return "\n".join(
        [
            "Afterimage is running.",
            f"  Studio    {stack.url}/",
            f"  API       {stack.url}/api/v1   described at {stack.url}/docs",
            f"  Flower    {stack.flower_url}/   user {user}, password {password}",
            *lines,
        ]
    )


def _arguments(words: list[str]) -> argparse.Namespace:
    own = words[: words.index("--")] if "--" in words else words
    arguments = _parser().parse_args(own)
    arguments.program = words[len(own) + 1 :]
    return arguments


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "on_message": partial(print, flush=True),
        "durable": not arguments.volatile,
        "servers_only": arguments.servers_only,
        "worker_module": arguments.worker_module,
        "settings": dict(setting.split("=", 1) for setting in arguments.setting),
        "instances": {kind: getattr(arguments, kind) for kind in KINDS},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ops.local",
        description="The local stack: the processes of production, with servers from wheels, inside one folder.",
        epilog="run -- COMMAND...: start the stack, run the command with its settings as environment, stop the stack.",
    )
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("--var", type=Path, default=REPOSITORY / "var", help="folder for the data of the stack")
    parser.add_argument("--servers-only", action="store_true", help="only Postgres and the two Valkeys")
    parser.add_argument("--volatile", action="store_true", help="faster; data may be lost in a power cut")
    parser.add_argument(
        "--worker-module", default="worker_service", metavar="MODULE", help="for tests: module to run as the workers"
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for tests: variable of the product's processes alone, such as the address of a connection pooler",
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=1, metavar="N", help=f"number of {kind} processes")
    return parser


_COMMANDS = {"up": up, "run": run, "down": down, "status": status}

if __name__ == "__main__":
    sys.exit(main())
