"""The address and API key that `afterimage login` stores in the user's folder of settings."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from afterimage_client.errors import InvalidInputError

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Login:
    url: str
    api_key: str | None = None


def path() -> Path:
    """Return the file of the login, such as `~/.config/afterimage/login.json` on Linux."""
    return Path(click.get_app_dir("afterimage")) / "login.json"


def save(login: Login) -> None:
    """Store a login in a file that only its user can read."""
    file = path()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.unlink(missing_ok=True)
    # The mode is set when the file is created, so that no other user can ever open it.
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(asdict(login), opened)
    part.replace(file)


def load() -> Login | None:
    """Return the stored login.

    Raises:
        InvalidInputError: its file is damaged or cannot be read.
    """
    try:
        return Login(**json.loads(path().read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"cannot read {path()}: {error}; delete it and log in again") from None


def resolve(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """Return address and key: the given ones, else those of the environment, else the stored ones.

    The stored key is used only for the stored address. An empty `api_key` means no key.
    """
    address = url or os.environ.get("AFTERIMAGE_URL") or None
    key = (os.environ.get("AFTERIMAGE_API_KEY") or None) if api_key is None else api_key
    if address is not None and key is not None:
        return address, key or None
    stored = load() or Login(DEFAULT_URL)
    address = address or stored.url
    if key is None and address.rstrip("/") == stored.url.rstrip("/"):
        key = stored.api_key
    return address, key or None
