"""Format the figures of an evaluation as JSON and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from scripts.evaluate import unseen_style
from scripts.evaluate.arms import Arm
from scripts.evaluate.evaluation import Evaluation, Models, Options
from scripts.evaluate.splits import Split
from scripts.evaluate.statistics import LEVEL, RESAMPLES, difference, estimate
from shared.retrieval import resolve_gate
from shared.settings import Settings
from worker_service.jobs.outputs import LIBRARIES
from worker_service.models.clip import Clip

COMPARED = ("judge_top1", "judge_top5", "clip_score", "clip_i")
"""Measures for which more is better; the others are descriptive."""
DECIDING = ("judge_top5", "clip_i")
PAIRS = ((Arm.RETRIEVED, Arm.NONE), (Arm.RETRIEVED, Arm.RANDOM))
COLUMNS = {
    "judge_top1": "top-1",
    "judge_top5": "top-5",
    "clip_score": "CLIP score",
    "clip_i": "CLIP-I",
    "copy_similarity": "copy cos",
    "copy_pixel_distance": "copy px",
    "diversity": "diversity",
}
MEASURES = """\
Arms: `none` the prompt alone, `random` the references of another prompt, `retrieved` the references of the service,
`oracle` images of the concept itself. The judge is a CLIP other than the retriever. Top-1 and top-5: share of images
for which the judge ranks the concept's name first, or among the first five, of all {names} names. CLIP score: the
judge's cosine of image and name. CLIP-I: its cosine of the image and a real image of the concept that no arm may use
({targets}). Copy: greatest judge cosine (cos) and least root mean square pixel difference in [0, 1] (px) between an
image and its references. For `none` and the real images, the retrieved references are used. Diversity: mean judge
distance, 1 - cosine, between the seeds of a prompt. Colours: the prompt names another colour than the commonest one of
its only reference; share of images in which that colour is the commonest. Intervals are 95 % percentile intervals of a
bootstrap over concepts. Differences are paired by concept and seed. A win is a concept for which retrieval is better; a
tie counts half."""


def summary(evaluation: Evaluation, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of `summary.json`. Equal conditions give equal figures, except `seconds_per_image`."""
    splits = evaluation.splits
    differences = {split: _differences(measured) for split, measured in splits.items()}
    measured: dict[str, Any] = {
        "conditions": dict(conditions),
        "retrieval_helps": {split: _retrieval_helps(pairs) for split, pairs in differences.items()},
        "retrieval": evaluation.retrieval,
        "retrieval_keywords": evaluation.keywords,
        "retrieval_unseen_style": {"skipped": evaluation.unseen}
        if isinstance(evaluation.unseen, str)
        else evaluation.unseen,
        "autoencoder": {"psnr_db": float(np.mean(evaluation.psnr_db)), "images": len(evaluation.psnr_db)},
        **{split: {arm: _means(scores) for arm, scores in splits[split].scores.items()} for split in splits},
        "intervals": {
            split: {arm: _intervals(scores) for arm, scores in splits[split].scores.items()} for split in splits
        },
        "differences": differences,
        "colours": evaluation.colours,
        "real_images": {split: _means(splits[split].real) for split in splits},
        "references_used": {
            split: {arm: float(np.mean([len(case.references[arm]) for case in splits[split].cases])) for arm in Arm}
            for split in splits
        },
        "seconds_per_image": {split: splits[split].seconds_per_image for split in splits},
    }
    figures: dict[str, Any] = rounded(measured)
    return figures


def conditions(evaluation: Evaluation, options: Options, settings: Settings, models: Models) -> dict[str, Any]:
    """Return everything that the figures depend on, without place and time of the measurement."""
    generator, given = models.generator, evaluation.corpus
    return {
        "retriever": clip_conditions(models.clip),
        "judge": clip_conditions(models.judge),
        "generator": {
            "name": generator.name,
            "pipeline": generator.capabilities.pipeline,
            "weights_digest": generator.capabilities.weights_digest,
            "source_revision": generator.settings.revision,
            "dtype": generator.capabilities.dtype,
            "device": generator.capabilities.device,
            "max_batch_size": generator.capabilities.max_batch_size,
            "defaults": generator.defaults.model_dump(),
        },
        "corpus": {
            "digest": given.digest,
            "images": len(given.images),
            "left_out": given.left_out,
            "seen_concepts": len(given.concepts(held_out=False)),
            "held_out_concepts": len(given.concepts(held_out=True)),
        },
        "concepts": {split: len(measured.cases) for split, measured in evaluation.splits.items()},
        "seeds": options.seeds,
        "references_per_image": evaluation.k,
        "min_similarity": resolve_gate(None, settings.retrieval.min_similarity).min_similarity,
        "duplicate_similarity": settings.retrieval.duplicate_similarity,
        "weight_temperature": settings.retrieval.weight_temperature,
        "clip_i_targets": "one image of each concept, kept out of the store"
        if isinstance(evaluation.unseen, str)
        else f"{unseen_style.TWEMOJI.name} {unseen_style.TWEMOJI.version}",
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "versions": {library: version(library) for library in (*LIBRARIES, "numpy", "pillow")},
    }


def clip_conditions(clip: Clip) -> dict[str, Any]:
    return {"name": clip.name, "weights_digest": clip.weights_digest, "space_digest": clip.space_digest}


def _means(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {measure: found.mean for measure, values in scores.items() if (found := estimate(values))}


def _intervals(scores: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {measure: [found.low, found.high] for measure, values in scores.items() if (found := estimate(values))}


def _differences(split: Split) -> dict[str, dict[str, Any]]:
    return {
        f"{better}-{other}": {
            measure: asdict(found)
            for measure in COMPARED
            if (found := difference(split.scores[better][measure], split.scores[other][measure]))
        }
        for better, other in PAIRS
    }


def _retrieval_helps(pairs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether all intervals of the deciding measures against both other arms are above zero.

    A measure without data counts as not better.
    """
    return all(measure in pair and pair[measure]["low"] > 0 for pair in pairs.values() for measure in DECIDING)


def rounded(value: Any) -> Any:
    """Return the value with all its numbers rounded, so that equal measurements give equal files."""
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value


def markdown_report(measured: Mapping[str, Any]) -> str:
    """Format the summary as Markdown."""
    given = measured["conditions"]
    parts = ["# Does retrieval help?", _verdict(measured)]
    for split in given["concepts"]:
        parts += [
            f"## {_split_name(split)}: {given['concepts'][split]} concepts, {given['seeds']} seeds each",
            _arm_table(measured, split),
            _difference_table(measured["differences"][split]),
        ]
    parts += ["## Colours of the prompt", _colour_table(measured["colours"])]
    parts += ["## Retrieval and autoencoder", _retrieval_table(measured), "## What was measured"]
    names = given["corpus"]["seen_concepts"] + given["corpus"]["held_out_concepts"]
    parts += [MEASURES.format(names=names, targets=given["clip_i_targets"]), _conditions_text(given)]
    return "\n\n".join(parts) + "\n"


def _verdict(measured: Mapping[str, Any]) -> str:
    verdicts = [
        f"On {_split_name(split).lower()}: **{'yes' if helps else 'not shown'}**."
        for split, helps in measured["retrieval_helps"].items()
    ]
    rule = (
        "Yes means: with retrieved references, judge top-5 and CLIP-I are higher than without references and than with "
        "random ones; all four 95 % intervals are above zero."
    )
    return "\n".join([*verdicts, rule])


def _split_name(split: str) -> str:
    return {"seen": "Seen concepts", "held_out": "Held-out concepts"}[split]


def _arm_table(measured: Mapping[str, Any], split: str) -> str:
    rows = []
    for arm in Arm:
        means, intervals = measured[split][arm], measured["intervals"][split][arm]
        cells = [
            _estimate(means.get(measure), intervals.get(measure) if measure in DECIDING else None)
            for measure in COLUMNS
        ]
        rows.append([arm, *cells, f"{measured['seconds_per_image'][split][arm]:.2f}"])
    real = measured["real_images"][split]
    rows.append(["real images", *(_estimate(real.get(measure), None) for measure in COLUMNS), ""])
    return markdown_table(["arm", *COLUMNS.values(), "s/image"], rows)


def _estimate(mean: float | None, interval: Sequence[float] | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else f"{mean:.2f}"


def _difference_table(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            pair.replace("-", " - "),
            COLUMNS[measure],
            f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]",
            f"{found['win_rate']:.0%}",
        ]
        for pair, by_measure in pairs.items()
        for measure, found in by_measure.items()
    ]
    return markdown_table(["difference", "measure", "mean with interval", "wins"], rows)


def _colour_table(colours: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [_split_name(split), str(found["images"]), *map(_share, (found["followed"], found["judge_top5"]))]
        for split, found in colours.items()
    ]
    return markdown_table(["split", "images", "in the colour of the prompt", "judge top-5"], rows)


def _share(found: Mapping[str, float]) -> str:
    return _estimate(found["mean"], (found["low"], found["high"]))


def _retrieval_table(measured: Mapping[str, Any]) -> str:
    found, unseen, keywords = (measured[name] for name in ("retrieval", "retrieval_unseen_style", "retrieval_keywords"))
    rows = [_recall("by name, in the corpus", found)]
    if "skipped" in unseen:
        rows.append([f"by name, in an unseen style: skipped, {unseen['skipped']}", ""])
    else:
        rows.append(_recall("by name, in an unseen style", unseen))
    if keywords:
        rows.append([f"by one of {keywords['keywords']} keywords", f"precision at 5 {keywords['p_at_5']:.3f}"])
    rows += [
        ["mean similarity of the nearest image", f"{found['mean_top1_similarity']:.3f}"],
        ["prompts that the relevance gate leaves without references", f"{found['share_without_references']:.1%}"],
        [
            f"autoencoder, {measured['autoencoder']['images']} images",
            f"PSNR {measured['autoencoder']['psnr_db']:.1f} dB",
        ],
    ]
    return markdown_table(["part", "figure"], rows)


def _recall(what: str, found: Mapping[str, Any]) -> list[str]:
    figures = f"R@1 {found['r_at_1']:.3f}, R@5 {found['r_at_5']:.3f}, MRR {found['mrr']:.3f}"
    return [f"{what} ({found['queries']} names, {found['images']} images)", figures]


def _conditions_text(given: Mapping[str, Any]) -> str:
    generator, defaults = given["generator"], given["generator"]["defaults"]
    return (
        f"Generator {generator['name']} `{generator['weights_digest'][:12]}`, retriever {given['retriever']['name']} "
        f"`{given['retriever']['weights_digest'][:12]}`, judge {given['judge']['name']} "
        f"`{given['judge']['weights_digest'][:12]}`, corpus `{given['corpus']['digest'][:12]}` of "
        f"{given['corpus']['images']} images; {defaults['num_inference_steps']} steps, guidance "
        f"{defaults['guidance_scale']:g}, adapter scale {defaults['ip_adapter_scale']:g}, up to "
        f"{given['references_per_image']} references above similarity {given['min_similarity']:g}, "
        f"on {generator['device']} in {generator['dtype']}. The rest is in `summary.json`."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
