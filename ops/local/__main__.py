"""`python -m ops.local up | run | down | status`: the local stack from a terminal."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ops.local.stack import REPOSITORY, LocalStack, StackError
from shared.errors import ConfigurationError


def main() -> int:
    arguments = _parser().parse_args()
    stack = LocalStack(arguments.var)
    try:
        return int(_COMMANDS[arguments.command](stack, arguments))
    except (StackError, ConfigurationError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def up(stack: LocalStack, arguments: argparse.Namespace) -> int:
    """Start in the background and print the addresses."""
    if stack.control.is_running():
        print("Already running.")
    else:
        stack.start(**_options(arguments))
    print(addresses(stack))
    return 0


def run(stack: LocalStack, arguments: argparse.Namespace) -> int:
    """Start in the foreground; Ctrl-C or SIGTERM stops everything."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        stack.start(attached=True, **_options(arguments))
        print(addresses(stack), flush=True)
        stack.wait_until_stopped()
    except KeyboardInterrupt:
        print("Stopping ...", flush=True)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave half of it running
        stack.stop()
    return 0


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


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "durable": not arguments.volatile,
        "servers_only": arguments.servers_only,
        "instances": {"api": arguments.api, "embed": arguments.embed, "generate": arguments.generate},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ops.local", description=__doc__)
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("--var", type=Path, default=REPOSITORY / "var", help="folder of the stack's data")
    parser.add_argument("--servers-only", action="store_true", help="only Postgres and the two Valkeys")
    parser.add_argument("--volatile", action="store_true", help="faster, and forgets data in a power cut")
    for kind in ("api", "embed", "generate"):
        parser.add_argument(f"--{kind}", type=int, default=1, metavar="N", help=f"number of {kind} processes")
    return parser


_COMMANDS = {"up": up, "run": run, "down": down, "status": status}

if __name__ == "__main__":
    sys.exit(main())
