"""A file that the service refuses is named in the client's error and in the report of `index_images`."""

import json
from pathlib import Path

import httpx
import pytest

from afterimage_client import Afterimage, ImageFile, ImagePatch, InvalidRequestError, OnInvalid, UploadFields
from scripts.index_images.report import Outcome, Report
from scripts.index_images.sources import read_source
from scripts.index_images.upload import Uploader
from shared.settings import Settings
from tests.integration.conftest import AppFactory, picture


@pytest.fixture
def service(settings: Settings, new_app: AppFactory) -> Afterimage:
    return Afterimage("http://localhost", retry_for_s=0, transport=httpx.WSGITransport(new_app(settings)))


def test_the_error_of_the_client_names_the_bad_file_among_many(service: Afterimage) -> None:
    files = [ImageFile(f"{colour}.png", picture(colour)) for colour in ("red", "green")]
    files.insert(1, ImageFile("holiday photo.png", b"no image"))
    with pytest.raises(InvalidRequestError, match=r"holiday photo\.png") as refused:
        service.images.upload(files)
    assert refused.value.context["index"] == 1
    outcomes = service.images.upload(files, UploadFields(on_invalid=OnInvalid.SKIP)).files
    assert [each.code for each in outcomes] == [None, refused.value.code, None], "in the order of the files"


def test_the_report_says_which_field_of_a_file_is_refused(service: Afterimage, tmp_path: Path) -> None:
    """The service merges what a file says with what people have set, and refuses too many tags."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    described = folder / "a.json"
    described.write_text(json.dumps({"tags": []}))
    report = Report(None)
    uploader = Uploader(service, "shared", report, update=True)
    assert [entry.outcome for entry in uploader.run(read_source(folder))] == [Outcome.CREATED]
    (image,) = service.images.list()
    service.images.change(image.id, ImagePatch(tags=[f"mine{number}" for number in range(30)]))
    described.write_text(json.dumps({"tags": [f"file{number}" for number in range(9)]}))
    uploader.load_known_images()
    (entry,) = uploader.run(read_source(folder))
    assert (entry.outcome, entry.file.endswith("a.png")) == (Outcome.SKIPPED, True)
    assert "tags" in (entry.detail or "")
