"""Outputs carry Content Credentials: signed by a worker, stored, downloaded, and read by the library of c2patool."""

import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import Session

from scripts.verify_image import Verdict, verify
from shared import content_credentials
from shared.content_credentials import ContentSigner
from shared.contracts.common import ImageFormat
from shared.contracts.jobs import ReplayVerdict
from shared.db import outputs
from shared.db.tables import Job, Output
from shared.errors import ConfigurationError
from shared.imaging import open_image, pixels_sha256, read_record
from shared.metrics import CONTENT_TIMESTAMPS
from shared.settings import Settings, get_settings
from shared.storage import get_blobs
from tests.integration.conftest import API, Client
from tests.integration.test_generation import add_embedded_image, reload, run, submit
from tests.recording_generator import RecordingGenerator
from tests.signing_certificates import SigningFiles, make_signing_files
from worker_service.jobs import content_credentials as signing_of_jobs
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.models.worker_models import Models
from worker_service.workers import generate

pytestmark = pytest.mark.skipif(not content_credentials.is_installed(), reason="c2pa-python is not installed")
Configure = Callable[..., None]


@pytest.fixture
def signing(tmp_path: Path) -> SigningFiles:
    return make_signing_files(tmp_path / "certificates")


@pytest.fixture
def configure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Let this process use other settings of Content Credentials."""

    def configure(files: SigningFiles, **changes: str) -> None:
        for name, value in (files.environment() | changes).items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        signing_of_jobs.get_signer.cache_clear()

    return configure


def drawn(session: Session, job: Job) -> list[Output]:
    session.expire_all()
    return list(outputs.list_by_job(session, [job.id])[job.id])


def manifest_of_file(data: bytes) -> tuple[str, dict[str, Any]]:
    """State and newest manifest of a file, by the library alone."""
    c2pa = import_module("c2pa")
    with c2pa.Reader(None, io.BytesIO(data)) as reader:
        store = json.loads(reader.json())
    return store["validation_state"], store["manifests"][store["active_manifest"]]


@pytest.mark.parametrize("image_format", ImageFormat)
def test_an_output_is_signed_with_its_references(
    session: Session,
    models: Models,
    leases: JobLeases,
    configure: Configure,
    signing: SigningFiles,
    client: Client,
    tmp_path: Path,
    image_format: ImageFormat,
) -> None:
    configure(signing)
    image_id = add_embedded_image(session, models, "red", "a red square")
    job = submit(session, seeds=[5], k=1, format=image_format)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (output,) = drawn(session, job)

    answer = client.get(f"{API}/generations/{output.id}/content")
    state, manifest = manifest_of_file(answer.data)
    assert state == "Valid"
    assert [each["title"] for each in manifest["ingredients"]][:2] == ["cheap (FakeGenerator)", "a red square"]
    assert manifest["ingredients"][1]["instance_id"] == f"urn:uuid:{image_id}"
    assert manifest["title"] == f"{job.id}-0.{image_format}"
    assert answer.headers["ETag"] == f'"{output.sha256}"'
    assert (len(answer.data), read_record(answer.data)) == (output.size_bytes, output.provenance)
    file = tmp_path / f"output.{image_format}"
    file.write_bytes(answer.data)
    finding = verify(file, trust=signing.issuer.read_text())
    assert (finding.verdict, finding.failures) == (Verdict.INTACT, [])
    assert finding.made_by["prompt"] == "a red apple"
    assert output.provenance["file_pixels_sha256"] == pixels_sha256(open_image(answer.data))


def test_outputs_are_not_signed_unless_the_settings_ask_for_it(
    session: Session,
    models: Models,
    leases: JobLeases,
) -> None:
    job = submit(session, seeds=[5], k=0)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    data = get_blobs().get(drawn(session, job)[0].blob_key)
    assert not content_credentials.has_manifest(data)
    assert content_credentials.read_credentials(data) is None


def test_an_output_that_cannot_be_signed_is_not_published(
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
    configure: Configure,
    signing: SigningFiles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The certificate has expired since the start of the worker."""
    configure(signing)
    expired = make_signing_files(tmp_path / "expired", days=(-3, -1))
    signer = ContentSigner(expired.certificate_chain.read_bytes(), expired.private_key.read_bytes())
    monkeypatch.setattr(signing_of_jobs, "get_signer", lambda: signer)
    job = submit(session, seeds=[5], k=0)
    assert run(job.id, models, leases) is Outcome.FAILED
    job = reload(session, job)
    assert (job.state, (job.error or {})["code"]) == ("failed", "content_credentials_failed")
    assert len(model.received) == 1, "it was drawn"
    assert outputs.list_by_job(session, [job.id]).get(job.id, []) == []


def test_a_job_succeeds_without_its_time_stamp_service(
    session: Session,
    models: Models,
    leases: JobLeases,
    configure: Configure,
    signing: SigningFiles,
) -> None:
    configure(signing, AFTERIMAGE_CONTENT_CREDENTIALS__TIMESTAMP_URL="http://127.0.0.1:9/")
    missing = CONTENT_TIMESTAMPS.labels("missing")._value.get()
    job = submit(session, seeds=[5, 6], k=0)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    for output in drawn(session, job):
        assert manifest_of_file(get_blobs().get(output.blob_key))[0] == "Valid"
    assert CONTENT_TIMESTAMPS.labels("missing")._value.get() == missing + 1, "asked once, and not again at once"


@pytest.mark.parametrize("format_", [ImageFormat.PNG, ImageFormat.WEBP])
def test_a_replay_of_a_signed_output_has_the_same_pixels(
    session: Session,
    models: Models,
    leases: JobLeases,
    configure: Configure,
    signing: SigningFiles,
    client: Client,
    format_: ImageFormat,
) -> None:
    configure(signing)
    job = submit(session, seeds=[5], k=0, format=format_)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (original,) = drawn(session, job)
    answer = client.post(f"{API}/generations/{original.id}/replay")
    assert answer.status_code == 202, answer.text
    replay_id = UUID(answer.json["id"])
    assert run(replay_id, models, leases) is Outcome.SUCCEEDED
    (again,) = drawn(session, session.get_one(Job, replay_id))
    assert again.replay is not None
    assert again.replay["verdict"] == ReplayVerdict.IDENTICAL
    assert again.sha256 != original.sha256, "each signature is new"


def test_a_signed_output_can_be_remembered(
    session: Session,
    models: Models,
    leases: JobLeases,
    configure: Configure,
    signing: SigningFiles,
    client: Client,
) -> None:
    configure(signing)
    job = submit(session, seeds=[5], k=0)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (output,) = drawn(session, job)
    remembered = client.post(f"{API}/generations/{output.id}/remember")
    assert remembered.status_code == 201, remembered.text
    stored = client.get(f"{API}/images/{remembered.json['id']}/content").data
    assert pixels_sha256(open_image(stored)) == pixels_sha256(open_image(get_blobs().get(output.blob_key)))
    assert not content_credentials.has_manifest(stored), "an image of the corpus has no metadata"


def test_without_the_prompt_no_part_of_the_file_names_it(
    session: Session,
    models: Models,
    leases: JobLeases,
    configure: Configure,
    signing: SigningFiles,
    tmp_path: Path,
) -> None:
    configure(signing, AFTERIMAGE_CONTENT_CREDENTIALS__INCLUDE_PROMPT="false")
    add_embedded_image(session, models, "red", "a picture")
    concepts = [{"text": "a zeppelin"}, {"text": "a walrus"}]
    texts = {"prompt": "a zeppelin and a walrus", "negative_prompt": "a kazoo"}
    job = submit(session, seeds=[5], k=2, format=ImageFormat.WEBP, concepts=concepts, **texts)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (output,) = drawn(session, job)
    data = get_blobs().get(output.blob_key)
    for word in (b"zeppelin", b"walrus", b"kazoo"):
        assert word not in data
    assert output.provenance["parameters"]["prompt"] == texts["prompt"], "the database keeps it"
    assert output.provenance["references"]
    file = tmp_path / "output.webp"
    file.write_bytes(data)
    finding = verify(file)
    assert finding.verdict is Verdict.INTACT
    assert "prompt" not in finding.made_by
    assert finding.made_by["references"][0]["caption"] == "a picture"


def test_a_worker_with_a_wrong_certificate_does_not_start(
    configure: Configure, signing: SigningFiles, tmp_path: Path, settings: Settings
) -> None:
    """Before it loads any model."""
    expired = make_signing_files(tmp_path / "expired", days=(-30, -1))
    configure(expired)
    with pytest.raises(ConfigurationError, match="the certificate and its key cannot sign") as refused:
        generate.serve(get_settings(), None)
    assert "\n" not in refused.value.message
    configure(SigningFiles(signing.certificate_chain, tmp_path / "absent.pem", signing.issuer))
    with pytest.raises(ConfigurationError, match=r"absent\.pem"):
        generate.serve(get_settings(), None)
