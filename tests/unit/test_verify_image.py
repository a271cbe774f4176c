"""`scripts.verify_image` reads files alone: a changed pixel is noticed, and the signature where there is one."""

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from scripts import verify_image
from scripts.verify_image import Verdict, verify
from shared import content_credentials
from shared.content_credentials import ContentSigner
from shared.contracts.common import ImageFormat
from shared.errors import ConfigurationError
from shared.imaging import encode_image, open_image, pixels_sha256, read_record, with_record
from shared.settings import ContentCredentialsSettings
from tests.signing_certificates import SigningFiles, make_signing_files
from tests.stack import wait_until
from tests.timestamp_server import OPENSSL, timestamp_server
from worker_service.jobs.content_credentials import manifest_of

REFERENCE = {
    "kind": "corpus",
    "image_id": "0196a1f0-0000-7000-8000-000000000001",
    "sha256": "ab" * 32,
    "similarity": 0.71,
    "weight": 0.25,
    "pinned": False,
    "caption": "a red apple",
}
RECORD: dict[str, Any] = {
    "job_id": "0196a1f0-0000-7000-8000-000000000002",
    "index": 0,
    "seed": 7,
    "mode": "reference",
    "parameters": {"prompt": "a green heart", "negative_prompt": None, "format": "png"},
    "model": {"name": "starter", "pipeline": "FluxPipeline", "weights_digest": "cd" * 32},
    "references": [REFERENCE],
    "versions": {"afterimage": "0.1.0"},
}

needs_c2pa = pytest.mark.skipif(not content_credentials.is_installed(), reason="c2pa-python is not installed")


def pixels(seed: int = 0) -> np.ndarray:
    """A smooth random image of 48 by 32 pixels."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((48, 32), Image.Resampling.BICUBIC))


def recorded(data: bytes, *, record: dict[str, Any] = RECORD) -> bytes:
    """The file with its record, as a worker writes it."""
    return with_record(data, {**record, "file_pixels_sha256": pixels_sha256(open_image(data))})


@pytest.fixture
def signing(tmp_path: Path) -> SigningFiles:
    return make_signing_files(tmp_path / "certificates")


@pytest.fixture
def signed(signing: SigningFiles) -> Callable[[ImageFormat], bytes]:
    """Output files of each format, signed as a worker signs them."""
    pytest.importorskip("c2pa")
    signer = ContentSigner.load(settings_of(signing))

    def make(image_format: ImageFormat) -> bytes:
        data = recorded(encode_image(pixels(), image_format=image_format))
        return signer.sign(data, image_format, manifest_of(RECORD))

    return make


def settings_of(files: SigningFiles) -> ContentCredentialsSettings:
    return ContentCredentialsSettings(
        enabled=True, certificate_chain=files.certificate_chain, private_key=files.private_key
    )


def file_of(folder: Path, data: bytes) -> Path:
    file = folder / "image"
    file.write_bytes(data)
    return file


def with_changed_pixel(data: bytes, image_format: ImageFormat) -> bytes:
    """The file with other image data, and every other byte of the file as it was."""
    with Image.open(io.BytesIO(data)) as opened:
        image = np.array(opened.convert("RGB"))
    if image_format is ImageFormat.PNG:
        image[5, 7, 0] ^= 1
        start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
        other = encode_image(image, image_format=image_format)
        return data[:start] + other[other.index(b"IDAT") - 4 : other.index(b"IEND") - 4] + data[end:]
    # Of a lossy format, one byte of the compressed data.
    position = data.rindex(b"\xff\xd9") - 20 if image_format is ImageFormat.JPEG else data.index(b"VP8 ") + 200
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("image_format", ImageFormat)
def test_an_unsigned_file_says_what_made_it_and_that_this_is_no_proof(
    tmp_path: Path, image_format: ImageFormat
) -> None:
    finding = verify(file_of(tmp_path, recorded(encode_image(pixels(), image_format=image_format))))
    assert finding.verdict is Verdict.INTACT
    assert finding.signer is None
    assert finding.made_by["prompt"] == "a green heart"
    assert (finding.made_by["model"], finding.made_by["seed"]) == ("starter", 7)
    assert finding.made_by["program"] == "Afterimage 0.1.0"
    assert finding.made_by["references"][0]["caption"] == "a red apple"
    assert any("does not prove who made the file" in sentence for sentence in finding.reasons)


@pytest.mark.parametrize("image_format", ImageFormat)
def test_a_changed_pixel_of_an_unsigned_file_is_noticed(tmp_path: Path, image_format: ImageFormat) -> None:
    original = recorded(encode_image(pixels(), image_format=image_format))
    changed = with_changed_pixel(original, image_format)
    assert read_record(changed) == read_record(original)
    assert not np.array_equal(np.asarray(open_image(changed)), np.asarray(open_image(original)))
    assert verify(file_of(tmp_path, changed)).verdict is Verdict.CHANGED


@pytest.mark.parametrize("image_format", ImageFormat)
def test_a_signed_file_is_intact_and_its_signer_is_trusted_by_a_list(
    tmp_path: Path, signed: Callable[[ImageFormat], bytes], signing: SigningFiles, image_format: ImageFormat
) -> None:
    file = file_of(tmp_path, signed(image_format))
    untrusted, trusted = verify(file), verify(file, trust=signing.issuer.read_text())
    assert (untrusted.verdict, trusted.verdict) == (Verdict.INTACT, Verdict.INTACT)
    assert (untrusted.failures, trusted.failures) == (["signingCredential.untrusted"], [])
    assert trusted.signer is not None
    assert (trusted.signer["common_name"], trusted.signer["issuer"]) == ("Test signer", "Test organisation")
    assert trusted.made_by["ai_generated"] is True
    assert trusted.made_by["prompt"] == "a green heart"
    other = make_signing_files(tmp_path / "other")
    assert verify(file, trust=other.issuer.read_text()).verdict is Verdict.UNVERIFIABLE


@pytest.mark.parametrize("image_format", ImageFormat)
def test_a_changed_pixel_of_a_signed_file_is_noticed(
    tmp_path: Path, signed: Callable[[ImageFormat], bytes], image_format: ImageFormat
) -> None:
    finding = verify(file_of(tmp_path, with_changed_pixel(signed(image_format), image_format)))
    assert finding.verdict is Verdict.CHANGED
    assert "assertion.dataHash.mismatch" in finding.failures


def test_a_changed_record_of_a_signed_file_is_noticed(tmp_path: Path, signed: Callable[[ImageFormat], bytes]) -> None:
    """The pixels stay, so that only the signature can show it."""
    data = signed(ImageFormat.WEBP)
    assert data.count(b"a green heart") == 2, "in the record and in the manifest"
    changed = data.replace(b'"a green heart"', b'"a black heart"')
    finding = verify(file_of(tmp_path, changed))
    assert finding.made_by["prompt"] == "a black heart"
    assert finding.verdict is Verdict.CHANGED


def test_the_manifest_names_the_model_and_the_references_as_inputs(signed: Callable[[ImageFormat], bytes]) -> None:
    """Read by the library alone, without a line of this product."""
    c2pa = import_module("c2pa")
    with c2pa.Reader("image/png", io.BytesIO(signed(ImageFormat.PNG))) as reader:
        manifest = reader.get_active_manifest()
    model, reference, prompt = manifest["ingredients"]
    assert {each["relationship"] for each in manifest["ingredients"]} == {"inputTo"}
    assert model["title"] == "starter (FluxPipeline)"
    assert model["metadata"]["afterimage:weights_digest"] == "cd" * 32
    assert reference["title"] == "a red apple"
    assert reference["instance_id"] == f"urn:uuid:{REFERENCE['image_id']}"
    assert reference["metadata"]["afterimage:sha256"] == "ab" * 32
    assert prompt["description"] == "a green heart"
    (action,) = next(each for each in manifest["assertions"] if each["label"] == "c2pa.actions.v2")["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert action["softwareAgent"] == {"name": "Afterimage", "version": "0.1.0"}
    assert len(action["parameters"]["ingredients"]) == 3


def test_signing_keeps_the_pixels_and_the_record(signed: Callable[[ImageFormat], bytes]) -> None:
    for image_format in ImageFormat:
        data = recorded(encode_image(pixels(), image_format=image_format))
        again = signed(image_format)
        assert read_record(again) == read_record(data)
        assert pixels_sha256(open_image(again)) == pixels_sha256(open_image(data))


def test_without_the_library_the_record_is_read_and_the_signature_is_named(
    tmp_path: Path, signed: Callable[[ImageFormat], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path, signed(ImageFormat.PNG))
    monkeypatch.setattr(content_credentials, "LIBRARY", "a_library_that_is_not_installed")
    finding = verify(file)
    assert finding.verdict is Verdict.INTACT
    assert any("They were not checked" in sentence for sentence in finding.reasons)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[c2pa\]'"):
        verify(file, trust="any")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {name: value for name, value in RECORD.items() if name != "file_pixels_sha256"},
        {"model": "x", "parameters": [], "references": "all", "versions": None},
    ],
)
def test_a_file_without_a_digest_is_not_verifiable(tmp_path: Path, record: dict[str, Any]) -> None:
    data = with_record(encode_image(pixels(), image_format=ImageFormat.PNG), record)
    assert verify(file_of(tmp_path, data)).verdict is Verdict.UNVERIFIABLE


@needs_c2pa
def test_a_manifest_on_another_server_is_not_fetched(tmp_path: Path, signing: SigningFiles) -> None:
    c2pa = import_module("c2pa")
    data, file = encode_image(pixels(), image_format=ImageFormat.PNG), io.BytesIO()
    with asked_server() as (url, asked):
        key, chain = signing.private_key.read_bytes(), signing.certificate_chain.read_bytes()
        with (
            c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", chain, key, None)) as signer,
            c2pa.Builder(manifest_of(RECORD)) as builder,
        ):
            builder.set_no_embed()
            builder.set_remote_url(f"{url}/manifest.c2pa")
            builder.sign(signer, "image/png", io.BytesIO(data), file)
        asked.clear()
        finding = verify(file_of(tmp_path, file.getvalue()))
        assert asked == []
        assert finding.verdict is Verdict.UNVERIFIABLE
        with pytest.raises(c2pa.C2paError):
            c2pa.Reader("image/png", io.BytesIO(file.getvalue()))
        assert asked == ["/manifest.c2pa"], "the library's default asks the server"


@contextmanager
def asked_server() -> Iterator[tuple[str, list[str]]]:
    """A server that has nothing, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        verify_image.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_exit_code_is_that_of_the_worst_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    intact, changed, broken = (tmp_path / name for name in ("intact.png", "changed.png", "broken.png"))
    data = recorded(encode_image(pixels(), image_format=ImageFormat.PNG))
    intact.write_bytes(data)
    changed.write_bytes(with_changed_pixel(data, ImageFormat.PNG))
    broken.write_bytes(data[: len(data) // 2])
    assert run(intact) == 0
    assert run(changed, intact) == 1
    assert run(intact, broken, changed) == 2
    assert run(tmp_path / "absent.png") == 2
    assert "absent.png: unreadable" in capsys.readouterr().out


def test_json_has_one_object_per_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(tmp_path, recorded(encode_image(pixels(), image_format=ImageFormat.JPEG)))
    assert run("--json", file, file) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == second
    assert (first["verdict"], first["made_by"]["seed"], first["file"]) == ("intact", 7, str(file))


@needs_c2pa
def test_a_trust_list_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(tmp_path, recorded(encode_image(pixels(), image_format=ImageFormat.PNG)))
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nno base64\n-----END CERTIFICATE-----\n")
    assert run("--trust", junk, file) == 2
    assert run("--trust", tmp_path / "absent.pem", file) == 2
    assert "absent.pem" in capsys.readouterr().err


def test_a_prompt_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a \x1b[2Jheart\x9b2J\r\n\u202ereversed"
    record = {**RECORD, "parameters": {"prompt": prompt}}
    png = PngImagePlugin.PngInfo()
    png.add_itxt("afterimage", json.dumps(record))
    Image.fromarray(pixels()).save(tmp_path / "image.png", pnginfo=png)
    run(tmp_path / "image.png")
    shown = capsys.readouterr().out
    assert r"a \x1b[2Jheart\x9b2J\r\n\u202ereversed" in shown


# --- the certificate ----------------------------------------------------------------------------------------------


@needs_c2pa
@pytest.mark.parametrize("days", [(-30, -1), (1, 30)], ids=["expired", "not yet valid"])
def test_a_certificate_outside_its_dates_is_refused(tmp_path: Path, days: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match="the certificate and its key cannot sign"):
        ContentSigner.load(settings_of(make_signing_files(tmp_path, days=days)))


@needs_c2pa
def test_a_certificate_for_another_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the certificate and its key cannot sign"):
        ContentSigner.load(settings_of(make_signing_files(tmp_path, uses=())))


@needs_c2pa
def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    one, other = make_signing_files(tmp_path / "one"), make_signing_files(tmp_path / "other")
    mixed = SigningFiles(one.certificate_chain, other.private_key, one.issuer)
    with pytest.raises(ConfigurationError, match="the certificate and its key cannot sign"):
        ContentSigner.load(settings_of(mixed))


@needs_c2pa
def test_a_missing_file_is_named_and_the_key_is_never_shown(tmp_path: Path, signing: SigningFiles) -> None:
    absent = SigningFiles(signing.certificate_chain, tmp_path / "absent.pem", signing.issuer)
    with pytest.raises(ConfigurationError, match=r"absent\.pem: No such file"):
        ContentSigner.load(settings_of(absent))
    assert "PRIVATE KEY" not in repr(ContentSigner.load(settings_of(signing)))


# --- time stamps --------------------------------------------------------------------------------------------------


def stamping(signing: SigningFiles, url: str, *, wait_s: float = 30) -> Callable[[], bytes]:
    """Sign a file with a time stamp of the service at `url`."""
    changes = {"timestamp_url": url, "timestamp_wait_s": wait_s}
    signer = ContentSigner.load(settings_of(signing).model_copy(update=changes))
    data = encode_image(pixels(), image_format=ImageFormat.PNG)
    return partial(signer.sign, data, ImageFormat.PNG, manifest_of(RECORD))


@needs_c2pa
@pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
def test_with_a_time_stamp_a_signature_outlives_its_certificate(tmp_path: Path, signing: SigningFiles) -> None:
    short = make_signing_files(tmp_path / "short", days=(-1, 8 / 86_400))
    with timestamp_server(tmp_path / "service") as service:
        stamped = stamping(short, service.url)()
        assert len(service.asked) == 1
    plain = ContentSigner.load(settings_of(short)).sign(
        encode_image(pixels(), image_format=ImageFormat.PNG), ImageFormat.PNG, manifest_of(RECORD)
    )
    trust = short.issuer.read_text() + service.issuer.read_text()

    def is_trusted(data: bytes, trust: str) -> bool:
        found = content_credentials.read_credentials(data, trust=trust)
        assert found is not None
        return found.is_trusted

    assert is_trusted(plain, trust)
    wait_until(lambda: not is_trusted(plain, trust), timeout_s=60, what="the end of the certificate")
    assert is_trusted(stamped, trust)
    assert not is_trusted(stamped, short.issuer.read_text()), "nobody knows the time stamp service"


@needs_c2pa
def test_a_time_stamp_service_without_an_answer_delays_one_signature(
    signing: SigningFiles, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sign = stamping(signing, f"http://127.0.0.1:{silent.getsockname()[1]}/", wait_s=0.2)
        for _ in range(3):
            found = content_credentials.read_credentials(sign())
            assert found is not None
            assert found.is_valid
        silent.settimeout(30)
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()
    (warning,) = [record for record in caplog.records if record.message == "timestamp_missing"]
    assert "no answer in 0.2 s" in str(vars(warning)["cause"])


@needs_c2pa
def test_a_time_stamp_service_that_refuses_fails_no_signature(signing: SigningFiles) -> None:
    with asked_server() as (url, _):
        found = content_credentials.read_credentials(stamping(signing, url)())
    assert found is not None
    assert found.is_valid


def test_without_the_library_the_settings_name_the_extra(
    signing: SigningFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_credentials, "LIBRARY", "a_library_that_is_not_installed")
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[c2pa\]'"):
        ContentSigner.load(settings_of(signing))


def test_a_signer_needs_both_files() -> None:
    with pytest.raises(ValueError, match="certificate_chain and private_key are required with enabled"):
        ContentCredentialsSettings(enabled=True, certificate_chain=Path("chain.pem"))
