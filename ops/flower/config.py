"""Flower's configuration in a container: its password is a file, not a variable that every process inherits."""

from pathlib import Path

basic_auth = [Path("/run/secrets/flower_auth").read_text().strip()]
