"""Content Credentials: signed manifests inside image files, as the standard C2PA defines them (https://spec.c2pa.org).

The library c2pa-python (the extra `c2pa`) signs and validates; the command-line tool c2patool uses the same code.
"""

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from shared.contracts.common import ImageFormat
from shared.errors import ConfigurationError, ContentCredentialsError
from shared.metrics import CONTENT_TIMESTAMPS

if TYPE_CHECKING:
    from shared.settings import ContentCredentialsSettings

logger = logging.getLogger(__name__)

LIBRARY = "c2pa"
INSTALL = "pip install '.[c2pa]'"
OFFLINE: dict[str, Any] = {
    # The address of a remote manifest is in the file, so an attacker may choose it.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of media that a trained model made."""
UNSIGNED_PARTS = "assertion.dataHash.additionalExclusionsPresent"
"""The signature leaves out parts of the file beside the manifest. Our files have none."""
TIMESTAMP_PAUSE_S = 60.0
"""How long a time stamp service is not asked after a failure. So the outputs of a job wait for it once, not each."""


@dataclass(frozen=True)
class Credentials:
    """The newest manifest of a file, and the result of its validation."""

    state: str
    """`Invalid`; `Valid`: the signature fits the file; `Trusted`: its signer is also on the trust list."""
    failures: tuple[str, ...]
    """Codes of the standard. An untrusted signer is one of them, also in state `Valid`."""
    manifest: Mapping[str, Any]

    @property
    def is_valid(self) -> bool:
        return self.state in ("Valid", "Trusted") and UNSIGNED_PARTS not in self.failures

    @property
    def is_trusted(self) -> bool:
        return self.is_valid and self.state == "Trusted"


def is_installed() -> bool:
    return find_spec(LIBRARY) is not None


def has_manifest(data: bytes) -> bool:
    """Whether an image file seems to contain a manifest. This needs no library."""
    return b"jumb" in data and b"c2pa" in data


def read_credentials(data: bytes, *, trust: str | None = None) -> Credentials | None:
    """Validate the newest manifest of a file; None: the file has none. It needs no network.

    trust: certificates of trusted issuers, as PEM.

    Raises:
        ConfigurationError: the library is not installed, or `trust` is not PEM.
    """
    c2pa = _library()
    settings = OFFLINE if trust is None else {**OFFLINE, "trust": {"trust_anchors": trust}}
    try:
        context = c2pa.Context.from_dict(settings)
    except c2pa.C2paError as error:
        raise ConfigurationError(f"The list of trusted certificates cannot be read: {error}") from None
    with context:
        try:
            reader = c2pa.Reader(None, io.BytesIO(data), context=context)
        except c2pa.C2paError.ManifestNotFound:
            return None
        except c2pa.C2paError as error:
            return Credentials("Invalid", (str(error),), {})
        with reader:
            store = json.loads(reader.json())
    failures = [each["code"] for each in store.get("validation_status") or []]
    notes = store.get("validation_results", {}).get("activeManifest", {}).get("informational") or []
    failures += [each["code"] for each in notes if each["code"] == UNSIGNED_PARTS]
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    return Credentials(store.get("validation_state", "Invalid"), tuple(dict.fromkeys(failures)), manifest)


@dataclass(frozen=True)
class ContentSigner:
    """Signs image files with one certificate. Threads may share it."""

    certificate_chain: bytes
    """PEM: the certificate of the signer, then those of its issuers."""
    private_key: bytes = field(repr=False)
    """PEM, PKCS #8."""
    algorithm: str = "es256"
    timestamps: "TimestampService | None" = None

    @classmethod
    def load(cls, settings: "ContentCredentialsSettings") -> Self:
        """Read the certificate and its key, and sign and validate a small image with them.

        Raises:
            ConfigurationError: the library or a file is missing, or they cannot sign.
        """
        _library()
        assert settings.certificate_chain is not None  # the settings check it
        assert settings.private_key is not None
        try:
            chain, key = settings.certificate_chain.read_bytes(), settings.private_key.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"content_credentials: {error.filename}: {error.strerror}") from None
        url = settings.timestamp_url
        timestamps = None if url is None else TimestampService(url, settings.timestamp_wait_s)
        signer = cls(chain, key, settings.algorithm, timestamps)
        try:
            signer._sign(SMALL_PNG, ImageFormat.PNG, {"assertions": [created_by({})]}, None)
        except ContentCredentialsError as error:
            raise ConfigurationError(
                f"content_credentials: the certificate and its key cannot sign: {error.message}"
            ) from None
        return signer

    def sign(self, data: bytes, image_format: ImageFormat, manifest: Mapping[str, Any]) -> bytes:
        """Return the file with a signed manifest. The image data stay as they are.

        If the time stamp service does not answer in time, the signature has no time stamp.

        manifest: a manifest definition (https://opensource.contentauthenticity.org/docs/manifest/json-ref/manifest-def).

        Raises:
            ContentCredentialsError: the library cannot sign, or the signature is not valid.
        """
        sign = partial(self._sign, data, image_format, manifest)
        stamped = None if self.timestamps is None else self.timestamps.stamp(sign)
        return sign(None) if stamped is None else stamped

    def _sign(
        self, data: bytes, image_format: ImageFormat, manifest: Mapping[str, Any], timestamp_url: str | None
    ) -> bytes:
        c2pa = _library()
        signed = io.BytesIO()
        try:
            # The library validates each signature that it makes, also the dates of the certificate.
            info = c2pa.C2paSignerInfo(self.algorithm, self.certificate_chain, self.private_key, timestamp_url)
            with (
                c2pa.Context.from_dict(OFFLINE) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(dict(manifest), context) as builder,
            ):
                builder.sign(signer, image_format.media_type, io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise ContentCredentialsError(f"The output could not be signed: {error}") from None
        return signed.getvalue()


class TimestampService:
    """An RFC 3161 service that dates signatures. A failure costs `wait_s` seconds and fails nothing."""

    def __init__(self, url: str, wait_s: float) -> None:
        self._url = url
        self._wait_s = wait_s
        self._paused_until = -TIMESTAMP_PAUSE_S

    def stamp(self, sign: Callable[[str], bytes]) -> bytes | None:
        """Return what `sign` returns for the address of the service; `None`: it gave no time stamp.

        After a failure, the service is not asked for `TIMESTAMP_PAUSE_S` seconds.
        """
        if time.monotonic() < self._paused_until:
            CONTENT_TIMESTAMPS.labels("not_asked").inc()
            return None
        answer: Future[bytes] = Future()
        # The library waits for the service for 30 s, and has no setting for it. The thread ends by then.
        threading.Thread(
            target=_fulfil, args=(answer, partial(sign, self._url)), name="time-stamp", daemon=True
        ).start()
        try:
            stamped = answer.result(self._wait_s)
        except (TimeoutError, ContentCredentialsError) as error:
            self._paused_until = time.monotonic() + TIMESTAMP_PAUSE_S
            CONTENT_TIMESTAMPS.labels("missing").inc()
            cause = f"no answer in {self._wait_s:g} s" if isinstance(error, TimeoutError) else error.message
            logger.warning("timestamp_missing", extra={"cause": cause})
            return None
        CONTENT_TIMESTAMPS.labels("stamped").inc()
        return stamped


def _fulfil(answer: Future[bytes], sign: Callable[[], bytes]) -> None:
    try:
        answer.set_result(sign())
    except Exception as error:  # the caller gets it
        answer.set_exception(error)


def created_by(agent: Mapping[str, Any], *, ingredients: tuple[str, ...] = ()) -> dict[str, Any]:
    """The assertion that a trained model made the image.

    agent: name and version of the program. ingredients: labels of the ingredients that went into the image.
    """
    action = {
        "action": "c2pa.created",
        "digitalSourceType": AI_GENERATED,
        **({"softwareAgent": dict(agent)} if agent else {}),
        **({"parameters": {"ingredientIds": list(ingredients)}} if ingredients else {}),
    }
    return {"label": "c2pa.actions.v2", "created": True, "data": {"actions": [action]}}


SMALL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)
"""One white pixel."""


def _library() -> Any:
    """The optional library, imported by name.

    Raises:
        ConfigurationError: it is not installed; the message says how to.
    """
    if not is_installed():
        raise ConfigurationError(f"Content Credentials need c2pa-python, an optional library: {INSTALL}")
    return import_module(LIBRARY)
