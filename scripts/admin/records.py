"""The two things that all commands share: how they are added, and how entries too wide for a table are printed."""

import argparse
import textwrap
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def print_record(title: str, *lines: dict[str, object]) -> None:
    """Print an entry for a terminal of 80 columns; empty fields are left out."""
    print(title)
    for line in lines:
        if shown := ", ".join(f"{name}: {value}" for name, value in line.items() if value not in ("", None)):
            print(textwrap.fill(shown, 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))
