"""The evaluation: the references of its arms, and a whole run on small models with random weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from rich.progress import Progress

from scripts.evaluate import report, unseen_style
from scripts.evaluate.arms import Arm, Case, build_case, image_requests
from scripts.evaluate.corpus import Corpus, choose_concepts, read_corpus
from scripts.evaluate.evaluation import Models, Options, evaluate
from scripts.evaluate.report_files import write_report_files
from scripts.evaluate.store import Store
from shared.contracts.generation import Mode
from shared.errors import ConfigurationError
from shared.settings import APISettings, GeneratorDefaults, ModelSettings, RetrievalSettings, Settings
from shared.vectors import l2_normalised
from tests import small_pipelines

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
HELD_OUT = {"purple", "black"}
UNGATED = RetrievalSettings(min_similarity=-1, duplicate_similarity=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two balls of each colour, described by JSON files; one image with only a caption; one without any."""
    path = tmp_path_factory.mktemp("corpus")
    for number, colour in enumerate(COLOURS):
        for radius in (8, 13):
            _ball(colour, radius).save(path / f"{number}-{radius}.png")
            fields = {
                "caption": f"a {colour} ball",
                "tags": ["ball", colour],
                "attributes": {"concept": f"{colour} ball", "split": "held-out" if colour in HELD_OUT else "train"},
            }
            (path / f"{number}-{radius}.json").write_text(json.dumps(fields))
    _ball("pink", 10).save(path / "captioned.png")
    (path / "captioned.txt").write_text("pink ball\n")
    _ball("brown", 10).save(path / "unknown.png")
    return path


def _ball(colour: str, radius: int) -> Image.Image:
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).ellipse((16 - radius, 16 - radius, 16 + radius, 16 + radius), fill=colour)
    return image


@pytest.fixture(scope="module")
def balls(folder: Path) -> Corpus:
    return read_corpus(folder, limits=APISettings(), threads=1)


def store_of(balls: Corpus, angles: Sequence[float], norm: float = 1.0) -> Store:
    """The images of `balls` with vectors of length `norm` in a plane, at these angles in degrees to the first axis."""
    radians = np.deg2rad(np.array(angles))
    return Store.of(balls.images, norm * np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32))


def towards(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], np.float32)


def test_a_folder_is_read_with_the_descriptions_of_its_images(balls: Corpus) -> None:
    assert balls.concepts(held_out=True) == ["purple ball", "black ball"]
    assert balls.concepts(held_out=False) == ["red ball", "green ball", "blue ball", "orange ball", "pink ball"]
    assert balls.left_out == 1
    assert {image.tags for image in balls.images if image.concept == "red ball"} == {("ball", "red")}


def test_a_corpus_without_captions_is_refused(tmp_path: Path) -> None:
    _ball("red", 8).save(tmp_path / "red.png")
    with pytest.raises(ConfigurationError, match="no image with a caption"):
        read_corpus(tmp_path, limits=APISettings(), threads=1)


def test_a_larger_choice_of_concepts_begins_with_the_smaller_one(balls: Corpus) -> None:
    few, more = choose_concepts(balls.concepts(), 3), choose_concepts(balls.concepts()[::-1], 5)
    assert len(few) == 3
    assert more[:3] == few


@pytest.fixture
def concept_circle(balls: Corpus) -> tuple[Store, dict[str, np.ndarray]]:
    """A corpus whose concepts lie on a circle, and the query of each concept, near the vectors of its images."""
    angles = {concept: 50.0 * place for place, concept in enumerate(balls.concepts())}
    counts: dict[str, int] = {}
    placed = []
    for image in balls.images:
        counts[image.concept] = counts.get(image.concept, 0) + 1
        placed.append(angles[image.concept] + counts[image.concept])
    return store_of(balls, placed), {concept: towards(angle) for concept, angle in angles.items()}


def case_of(
    concept_circle: tuple[Store, dict[str, np.ndarray]], concept: str, settings: RetrievalSettings, k: int = 2
) -> Case:
    store, queries = concept_circle
    return build_case(concept, store=store, queries=queries, k=k, seeds=3, settings=settings)


def concepts_of(case: Case, arm: Arm, store: Store) -> set[str]:
    return {store.image(reference.scored).concept for reference in case.references[arm]}


@pytest.mark.parametrize("colour", COLOURS)
def test_each_arm_has_the_references_of_its_name(
    concept_circle: tuple[Store, dict[str, np.ndarray]], colour: str
) -> None:
    concept = f"{colour} ball"
    found = case_of(concept_circle, concept, UNGATED, k=3)
    assert not found.references[Arm.NONE]
    assert concept in concepts_of(found, Arm.RETRIEVED, concept_circle[0])
    assert concepts_of(found, Arm.ORACLE, concept_circle[0]) == {concept}
    assert found.references[Arm.RANDOM]
    assert concept not in concepts_of(found, Arm.RANDOM, concept_circle[0])


def test_references_are_weighted_and_filtered_as_in_the_service(balls: Corpus) -> None:
    store = store_of(balls, [0, 1, 40, 80, 100, 120, 140, 160, 180, 200, 220, 240, 260])
    settings = RetrievalSettings(min_similarity=0.5, duplicate_similarity=0.999, weight_temperature=0.1)
    planned = store.plan(towards(0), k=3, settings=settings)
    # The second image duplicates the first. The image at 80 degrees is not similar enough.
    assert [round(reference.scored.similarity, 2) for reference in planned] == [1.0, 0.77, 0.17]
    assert [reference.used for reference in planned] == [True, True, False]
    first, second = planned[0].weight, planned[1].weight
    assert first + second == pytest.approx(1)
    assert first / second == pytest.approx(np.exp((1 - np.cos(np.deg2rad(40))) / 0.1), rel=0.01)


def test_a_prompt_without_relevant_images_gets_no_references(
    concept_circle: tuple[Store, dict[str, np.ndarray]],
) -> None:
    store, queries = concept_circle
    strict = RetrievalSettings(min_similarity=0.9)
    more_queries = queries | {"nothing": towards(-30)}
    found = build_case("nothing", store=store, queries=more_queries, k=2, seeds=1, settings=strict)
    assert not found.references[Arm.RETRIEVED]
    assert found.references[Arm.RANDOM], "other prompts find references"


# --- on small models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(model_settings: ModelSettings) -> Settings:
    quick = GeneratorDefaults(width=64, height=64, num_inference_steps=2, ip_adapter_scale=1)
    generator = model_settings.generators["sd15"].model_copy(update={"defaults": quick, "max_batch_size": 4})
    model = model_settings.model_copy(update={"generators": {"sd15": generator}, "default_generator": "sd15"})
    return Settings(model=model, retrieval=UNGATED)


@pytest.fixture(scope="module")
def options(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    judge = tmp_path_factory.mktemp("judge")
    small_pipelines.save_clip(judge, seed=1)
    return Options(corpus=folder, judge=f"local-dir:{judge}", model=None, concepts=2, seeds=2, unseen_style=False)


@pytest.fixture(scope="module")
def models(options: Options, settings: Settings) -> Models:
    return Models.load(options, settings)


def run(options: Options, settings: Settings, models: Models, out: Path) -> dict[str, Any]:
    with Progress(disable=True) as progress:
        evaluation = evaluate(options, settings, models, progress)
    measured = report.summary(evaluation, report.conditions(evaluation, options, settings, models))
    write_report_files(evaluation, measured, out=out, queries=["red", "a ball"], models=models, settings=settings)
    read: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return read


def test_every_arm_has_the_same_seeds_and_the_conditioning_of_the_service(
    balls: Corpus, models: Models, settings: Settings
) -> None:
    projections = models.clip.encode_image([image.open() for image in balls.images])
    store = Store.of(balls.images, projections)
    queries = dict(zip(balls.concepts(), l2_normalised(models.clip.encode_text(balls.concepts())), strict=True))
    cases = [
        build_case(concept, store=store, queries=queries, k=2, seeds=2, settings=settings.retrieval)
        for concept in ("red ball", "black ball")
    ]
    arm_requests = {arm: list(image_requests(cases, arm, model=models.generator, store=store)) for arm in Arm}
    assert len({(request.prompt, request.seed) for request in arm_requests[Arm.NONE]}) == 4
    for arm in Arm:
        assert [(r.prompt, r.seed) for r in arm_requests[arm]] == [(r.prompt, r.seed) for r in arm_requests[Arm.NONE]]
        assert {r.mode for r in arm_requests[arm]} == {Mode.NONE if arm is Arm.NONE else Mode.IMAGE_PROMPT}
        assert len({r.batch_key() for r in arm_requests[arm]}) == 1
    oracle = arm_requests[Arm.ORACLE][0].references
    expected = [p for p, image in zip(projections, balls.images, strict=True) if image.concept == "red ball"]
    assert np.stack([r.vector for r in oracle if r.vector is not None]) == pytest.approx(np.stack(expected), abs=2e-3)
    assert [reference.weight for reference in oracle] == [0.5, 0.5]


def test_a_run_measures_both_splits_and_equal_runs_give_equal_figures(
    options: Options, settings: Settings, models: Models, tmp_path: Path
) -> None:
    first = run(options, settings, models, tmp_path / "first")
    second = run(options, settings, models, tmp_path / "second")
    seconds = first.pop("seconds_per_image")
    second.pop("seconds_per_image")
    assert first == second
    for name in ("chart.png", "sheet.png", "queries.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    for split in ("seen", "held_out"):
        for arm in Arm:
            figures = first[split][arm]
            assert 0 <= figures["judge_top1"] <= figures["judge_top5"] <= 1
            assert -1 <= figures["clip_i"] <= 1
            assert 0 <= figures["copy_pixel_distance"] <= 1
            assert figures["diversity"] > 0
            assert seconds[split][arm] > 0
        assert len({first[split][arm]["clip_i"] for arm in Arm}) == 4, "references change the images"
        for pair in ("retrieved-none", "retrieved-random"):
            for measure in ("judge_top5", "clip_i"):
                found = first["differences"][split][pair][measure]
                better, other = (first[split][arm][measure] for arm in pair.split("-"))
                assert found["mean"] == pytest.approx(better - other, abs=2e-5)
                assert found["low"] <= found["mean"] <= found["high"]
    assert 0 <= first["retrieval"]["r_at_1"] <= first["retrieval"]["r_at_5"] <= 1
    assert first["retrieval_unseen_style"] == {"skipped": "not requested"}
    assert first["autoencoder"]["psnr_db"] > 0
    assert first["conditions"]["corpus"]["images"] == 13
    assert "held-out" in (tmp_path / "first" / "table.md").read_text().lower()


def test_images_to_compare_with_are_not_in_the_store(options: Options, settings: Settings, models: Models) -> None:
    with Progress(disable=True) as progress:
        evaluation = evaluate(replace(options, seeds=1), settings, models, progress)
    concepts = [case.concept for split in evaluation.splits.values() for case in split.cases]
    several = [concept for concept in concepts if concept != "pink ball"]
    assert set(evaluation.targets) == set(several)
    in_store = [image.concept for image in evaluation.store.images]
    assert all(in_store.count(concept) == 1 for concept in several)


def test_the_retriever_cannot_be_its_own_judge(options: Options, settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="retriever"):
        Models.load(replace(options, judge=settings.model.clip.model), settings)


def test_without_npm_the_unseen_style_is_skipped_with_a_reason(
    options: Options, settings: Settings, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with_unseen_style = replace(options, unseen_style=True, cache=tmp_path / "packages", concepts=1, seeds=1)
    assert "npm" in run(with_unseen_style, settings, models, tmp_path / "out")["retrieval_unseen_style"]["skipped"]


@pytest.mark.parametrize(
    ("name", "slug"), [("Santa Claus", "santa-claus"), ("piñata", "pinata"), ("woman's hat", "womans-hat")]
)
def test_a_concept_is_looked_up_in_the_unseen_style_by_the_slug_of_its_name(name: str, slug: str) -> None:
    assert unseen_style.slug(name) == slug
