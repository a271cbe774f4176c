"""`scripts.calibrate` on a part of the starter corpus with the starter CLIP, and the gate that follows from it."""

import io
import json
import logging
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from PIL import Image as Picture
from prometheus_client import REGISTRY
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from scripts.admin import __main__ as admin
from scripts.calibrate import __main__ as command
from scripts.calibrate import sample
from shared.cache import get_cache_manager
from shared.contracts.calibration import Calibration
from shared.db import calibrations, spaces
from shared.db.spaces import Space
from shared.db.tables import EmbeddingSpace, Image
from shared.settings import STARTER, ModelSettings, Settings, get_settings
from tests.factories import SHARED_COLLECTION, make_image
from tests.integration.conftest import API, Client
from tests.integration.test_api_search import embed_worker
from worker_service.maintenance.housekeeping import Housekeeping
from worker_service.models.clip import Clip

THINGS = {"red apple", "toolbox", "backpack", "dog", "dog face", "green apple", "strawberry"}
EVERY = 8
"""One of so many captions is part of the corpus, beside THINGS."""


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(ModelSettings())


@pytest.fixture(scope="module")
def part(clip: Clip) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Descriptions and vectors of about 370 starter images with 130 captions."""
    described, pictures = [], []
    captions = dict[str, int]()
    with tarfile.open(STARTER / "corpus.tar.gz") as corpus:
        contents = {member.name: corpus.extractfile(member) for member in corpus}
        for name, file in contents.items():
            if name.endswith(".json"):
                fields = json.load(file or io.BytesIO())
                number = captions.setdefault(fields["caption"], len(captions))
                if number % EVERY == 0 or fields["caption"] in THINGS:
                    picture = contents[name.replace(".json", ".webp")]
                    assert picture is not None
                    described.append(fields)
                    pictures.append(Picture.open(picture).convert("RGB"))
        return list(zip(described, clip.encode_image(pictures), strict=True))


@pytest.fixture
def space(session: Session, settings: Settings, clip: Clip) -> Space:
    """A space of the starter CLIP under another digest, so that it has no calibration yet."""
    space = spaces.ensure(session, digest="ab" * 32, model="starter", dim=clip.dim)
    session.commit()
    return space


@pytest.fixture
def corpus(session: Session, space: Space, part: list[tuple[dict[str, Any], np.ndarray]]) -> int:
    """Add the images of `part`; return their number."""
    for fields, vector in part:
        make_image(session, vector=vector, space=space, caption=fields["caption"], tags=fields["tags"])
    session.commit()
    return len(part)


@pytest.fixture
def worker(space: Space, clip: Clip) -> Iterator[None]:
    with embed_worker(space, embed=clip.encode_text):
        yield


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr("sys.argv", ["calibrate", *options])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def relevance(client: Client) -> Any:
    return client.get(f"{API}/models").json["relevance"]


def decisions(client: Client, prompt: str, **query: object) -> dict[str, tuple[bool, str]]:
    """Whether a reference with a caption is used, and the reason, by the caption."""
    answer = client.get(f"{API}/rag/search", query_string={"prompt": prompt, **query})
    assert answer.status_code == 200, answer.text
    return {each["caption"]: (each["used"], each["reason"]) for each in reversed(answer.json["references"])}


def used(client: Client, prompt: str, **query: object) -> set[str]:
    return {caption for caption, (is_used, _) in decisions(client, prompt, **query).items() if is_used}


def test_the_measured_thresholds_keep_wrong_images_out(
    client: Client, session: Session, space: Space, corpus: int, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = relevance(client)
    assert (before["origin"], before["min_similarity"], before["calibration"]) == ("default", 0.42, None)
    assert "is not calibrated" in before["warning"]
    absent = ("a vase", "a dinosaur")
    assert all(used(client, thing) for thing in absent), "0.42 lets wrong images pass"

    assert run(monkeypatch, "--json") == 0
    after = relevance(client)
    measured = after["calibration"]
    assert (after["origin"], after["warning"], measured["images"]) == ("calibration", None, corpus)
    assert {name: after[name] for name in ("min_similarity", "max_gap", "matched_min_similarity")} == {
        name: measured[name] for name in ("min_similarity", "max_gap", "matched_min_similarity")
    }
    assert 0.5 < after["min_similarity"] < 0.7
    assert 0.25 < after["matched_min_similarity"] < after["min_similarity"]
    assert 0.02 < after["max_gap"] < 0.25
    assert measured["precision"] >= 0.9
    assert measured["false_accepts"] <= 0.1
    assert measured["recall"] >= 0.75

    apple = decisions(client, "a red apple")
    assert {caption for caption, (is_used, _) in apple.items() if is_used} == {"red apple"}
    assert "is below" in next(reason for is_used, reason in apple.values() if not is_used)
    assert used(client, "two dogs") <= {"dog", "dog face"}
    assert "dog" in used(client, "two dogs"), "the caption has the word"
    for nothing in ("asdfgh", "quarterly tax report", *absent):
        assert used(client, nothing) == set(), nothing

    # A number of the request is the whole rule.
    assert used(client, "a vase", min_similarity=0.42)
    # A job keeps the thresholds with which it was submitted.
    job = client.post(f"{API}/rag/generate", json={"prompt": "a red apple"}).json
    assert {name: job["parameters"][name] for name in ("min_similarity", "max_gap", "matched_min_similarity")} == {
        name: after[name] for name in ("min_similarity", "max_gap", "matched_min_similarity")
    }
    alone = client.post(f"{API}/rag/generate", json={"prompt": "a red apple", "min_similarity": 0.3}).json
    assert alone["parameters"]["min_similarity"] == 0.3
    assert "max_gap" not in alone["parameters"]


def test_a_dry_run_stores_nothing_a_rerun_replaces_and_a_reset_removes(
    session: Session,
    space: Space,
    corpus: int,
    worker: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--sample", "40", "--json")

    def stored() -> Calibration | None:
        session.rollback()
        return calibrations.find(session, space)

    assert run(monkeypatch, *options, "--dry-run") == 0
    assert stored() is None
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["stored"], event["images"]) == ("calibration", False, corpus)
    assert run(monkeypatch, *options) == 0
    first = stored()
    assert run(monkeypatch, *options, "--space", space.digest[:12]) == 0
    second = stored()
    assert first is not None
    assert second is not None
    assert second.measured_at > first.measured_at
    assert second.model_copy(update={"measured_at": first.measured_at}) == first, "the sample is always the same"
    assert run(monkeypatch, "--reset") == 0
    assert stored() is None


def test_prompts_of_ones_own_count_and_a_wrong_row_is_named(
    session: Session,
    space: Space,
    corpus: int,
    worker: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dog = session.scalar(select(Image.id).where(Image.caption == "dog"))
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "my friend on four legs", "caption": "Dog "},
        {"prompt": "two dogs", "image_id": str(dog)},
        {"prompt": "a dog that we do not have"},
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    queries = sample.read_prompts(session, prompts, collection_id=SHARED_COLLECTION)
    assert [(query.fits_nothing, sorted(query.captions)) for query in queries] == [
        (False, ["dog"]),
        (False, ["dog"]),
        (True, []),
    ]
    assert run(monkeypatch, "--sample", "20", "--json", "--prompts", str(prompts)) == 0
    assert json.loads(capsys.readouterr().out)["queries"] == 43

    for row, problem in (({"caption": "dog"}, "no prompt"), ({"prompt": "x", "caption": "nothing"}, "'nothing'")):
        prompts.write_text(json.dumps(row))
        assert run(monkeypatch, "--prompts", str(prompts)) == 2
        assert "line 1: " in (error := capsys.readouterr().err.replace("\n", " "))
        assert problem in error


@pytest.mark.parametrize("captions", [[], [None] * 60, ["a photo"] * 60, [f"thing {n}" for n in range(49)]])
def test_a_collection_with_too_few_captions_is_refused_in_one_line(
    session: Session,
    space: Space,
    captions: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, caption in enumerate(captions):
        vector = np.eye(space.dim)[number % space.dim]
        make_image(session, vector=vector, space=space, caption=caption)
    session.commit()
    assert run(monkeypatch) == 2
    different = len({caption for caption in captions if caption})
    error = capsys.readouterr().err
    assert f"has {different} different captions" in error
    assert error.count("\n") == 1


def test_a_changed_corpus_makes_the_calibration_old(
    client: Client,
    session: Session,
    space: Space,
    corpus: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calibrations.store(session, space, calibration(images=corpus))
    session.commit()
    assert relevance(client)["warning"] is None
    some = session.scalars(select(Image.id).limit(corpus // 4)).all()
    session.execute(delete(Image).where(Image.id.in_(some)))
    session.commit()
    get_cache_manager().invalidate("calibration-warning*")  # it is kept for a minute
    warning = relevance(client)["warning"]
    assert f"calibrated on {corpus} images, and the collection has {corpus - corpus // 4} now" in warning

    monkeypatch.setattr("sys.argv", ["admin", "list-spaces"])
    admin.main()
    assert warning in " ".join(capsys.readouterr().out.split())
    housekeeping = Housekeeping(get_settings(), threading.Event())
    with caplog.at_level(logging.WARNING):
        housekeeping.check_calibration()
        housekeeping.check_calibration()
    logged = [record for record in caplog.records if record.message == "calibration_outdated"]
    assert len(logged) == 1, "once while the reason stays the same"
    assert REGISTRY.get_sample_value("calibration_outdated") == 1


def test_a_setting_takes_the_place_of_the_calibration(
    client: Client, session: Session, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrations.store(session, space, calibration(images=10))
    session.commit()
    monkeypatch.setenv("AFTERIMAGE_RETRIEVAL__MIN_SIMILARITY", "0.5")
    get_settings.cache_clear()
    shown = relevance(client)
    assert (shown["origin"], shown["min_similarity"], shown["max_gap"], shown["warning"]) == (
        "setting",
        0.5,
        None,
        None,
    )
    assert shown["calibration"]["min_similarity"] == 0.6


def test_the_starter_clip_brings_its_calibration(client: Client, session: Session, clip: Clip) -> None:
    spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    shown = relevance(client)
    assert (shown["origin"], shown["calibration"]["collection_id"]) == ("calibration", str(SHARED_COLLECTION))
    assert shown["warning"] is None, "an empty collection has nothing to keep out"
    assert shown["min_similarity"] > 0.5


def test_a_row_that_cannot_be_read_counts_as_no_calibration(client: Client, session: Session, space: Space) -> None:
    session.execute(update(EmbeddingSpace).values(calibration={"min_similarity": "high"}))
    session.commit()
    assert relevance(client)["origin"] == "default"
    newer = calibration(images=10).model_dump(mode="json") | {"of_a_later_release": 1}
    session.execute(update(EmbeddingSpace).values(calibration=newer))
    session.commit()
    assert relevance(client)["origin"] == "calibration"


def calibration(*, images: int, collection_id: UUID = SHARED_COLLECTION) -> Calibration:
    return Calibration.model_validate(
        {
            "min_similarity": 0.6,
            "max_gap": 0.1,
            "matched_min_similarity": 0.4,
            "measured_at": "2026-11-29T12:00:00Z",
            "collection_id": collection_id,
            "images": images,
            "queries": 100,
            "references": 4,
            "precision": 0.95,
            "recall": 0.9,
            "recall_without_words": 0.8,
            "false_accepts": 0.05,
        }
    )
