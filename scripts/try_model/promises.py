"""Checks on this device what the service promises of every model. A GPU, its kernels or a precision could break it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from scripts.try_model.random_numbers import RandomNumberWatch
from scripts.try_model.report import Check, Outcome, Previews
from scripts.try_model.trial import Trial
from shared.capabilities import drawable_size
from shared.contracts.generation import Mode
from shared.errors import BaseAppException, ModelOutOfMemoryError
from worker_service.execution.steps import CallStopped
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.generation.previews import Previewer
from worker_service.models.interface import ImageRequest
from worker_service.models.pipelines.probe import INVISIBLE, LONG, MORE_THAN_ROUNDING, REFUSALS, SHORT

MOST_STEPS = 4
"""Steps of the checked images. The promises do not depend on the number, and rounding grows with it."""
CANCEL_STEPS = 8
"""Steps of the call that is stopped in the middle: a device that lags behind the program shows itself."""
NO_STEPS = "an engine elsewhere draws, and reports no steps"
TINY_WEIGHT = 1e-6
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NOT_MONOTONE = 0.1
"""Share of the whole effect of a weight by which a larger weight may lie nearer to none. Steps amplify rounding."""
STOP_STEPS, STOP_S = 1.5, 0.25
"""A stopped call ends within this many steps, plus this many seconds for the program."""


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    passed: bool | None
    """None: there was nothing to check."""
    detail: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass
class Shown:
    """A preview listener that keeps the size of each preview."""

    sizes: list[str] = field(default_factory=list)

    def is_due(self, step: int, total_steps: int) -> bool:
        return True

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        self.sizes.append(f"{pixels.shape[1]} x {pixels.shape[0]}")


def difference(images: np.ndarray, others: np.ndarray) -> float:
    """The largest difference of a channel of a pixel, in [0, 1]."""
    return float(np.abs(images - others).max())


@dataclass
class Promises:
    """The checks of one generator."""

    trial: Trial
    rounding: float = 0.0
    """Largest difference between an image alone and beside an image of the same prompt: only kernels differ."""

    def __post_init__(self) -> None:
        self.trial = replace(self.trial, steps=min(self.trial.steps, MOST_STEPS))
        self.plain = self.trial.plain_mode
        self.most = min(2, len(self.trial.references))
        """References of the checked images."""

    @property
    def tolerance(self) -> float:
        """As in the probe of the start: `worker_service.models.pipelines.probe`."""
        return max(INVISIBLE, MORE_THAN_ROUNDING * self.rounding)

    def checks(self) -> Iterator[Check]:
        """Make all checks, each with its result. A failed call is a failed check.

        Raises:
            AcceleratorLostError: the device no longer responds.
        """
        plain, weighing = self.plain.value, self.trial.weighing_mode
        yield self._check("repeatable", plain, self._repeatable)
        yield self._check("rounding_of_batches", plain, self._measure_rounding)
        for mode in self.trial.modes:
            yield self._check("random_numbers_are_seeded", mode, partial(self._random_numbers_are_seeded, mode))
        yield self._check("prompt_changes_image", plain, partial(self._changes, prompt=f"{LONG}, at night"))
        yield self._check("seed_changes_image", plain, partial(self._changes, seed=1))
        for mode in self.trial.modes:
            if mode is not Mode.NONE:
                yield self._check("references_change_image", mode, partial(self._references_change_image, mode))
        for mode in self.trial.modes:
            yield self._check("alone_equals_batched", mode, partial(self._alone_equals_batched, mode))
        for mode in self.trial.modes:
            yield self._check("interrupted_equals_alone", mode, partial(self._interrupted_equals_alone, mode))
        if weighing is not None:
            yield self._check("weight_0_leaves_out", weighing, partial(self._equals_left_out, weighing, weight=0.0))
            yield self._check("tiny_weight_fades", weighing, partial(self._tiny_weight_fades, weighing))
            yield self._check("scale_0_leaves_out", weighing, partial(self._scale_0_leaves_out, weighing))
            yield self._check("weights_are_monotone", weighing, partial(self._weights_are_monotone, weighing))
        yield self._check("schedulers_draw", plain, self._schedulers_draw)
        yield self._check("loras_change_image", plain, self._loras_change_image)
        yield self._check("other_sizes_draw", plain, self._other_sizes_draw)
        yield self._check("previews_change_nothing", plain, self._previews_change_nothing)
        yield self._check("cancel_stops_within_a_step", plain, self._cancel_stops)

    def _check(self, name: str, mode: str | Mode, look: Callable[[], Finding]) -> Check:
        try:
            found = look()
        except ModelOutOfMemoryError as error:
            found = Finding(None if name == "alone_equals_batched" else False, f"out of memory: {error}")
        except (BaseAppException, *REFUSALS) as error:
            found = Finding(False, f"{type(error).__name__}: {error}")
        outcome = Outcome.SKIPPED if found.passed is None else Outcome.PASS if found.passed else Outcome.FAIL
        return Check(
            name=name,
            mode=Mode(mode).value,
            outcome=outcome,
            detail=found.detail,
            difference=found.difference,
            tolerance=found.tolerance,
        )

    def _equal(self, images: np.ndarray, others: np.ndarray, detail: str) -> Finding:
        found = difference(images, others)
        return Finding(found <= self.tolerance, detail, found, self.tolerance)

    def _unequal(self, images: np.ndarray, others: np.ndarray, detail: str) -> Finding:
        found = difference(images, others)
        return Finding(found > self.tolerance, detail, found, self.tolerance)

    def _with_references(self, mode: Mode, **changes: Any) -> ImageRequest:
        return self.trial.request(mode, references=0 if mode is Mode.NONE else self.most, **changes)

    # --- seeds ----------------------------------------------------------------------------------------------------

    def _repeatable(self) -> Finding:
        request = self.trial.request(self.plain)
        found = self._equal(self.trial.draw(request), self.trial.draw(request), "the same call twice")
        return replace(found, detail=f"{found.detail}: {'identical' if found.difference == 0 else 'not identical'}")

    def _measure_rounding(self) -> Finding:
        if self.trial.capabilities.max_batch_size == 1:
            return Finding(None, "this model draws one image per call")
        request = self.trial.request(self.plain)
        beside = self.trial.draw(request, replace(request, seed=1))
        self.rounding = difference(beside[:1], self.trial.draw(request))
        return Finding(
            True, "beside an image of the same prompt, and alone; sets the tolerance below", self.rounding, None
        )

    def _random_numbers_are_seeded(self, mode: Mode) -> Finding:
        if not isinstance(self.trial.model, Diffusion):
            return Finding(None, "the model does not draw with torch in this process")
        with RandomNumberWatch() as watch:
            self.trial.draw(self._with_references(mode))
        others = ", ".join(sorted(watch.others))
        detail = f"not from the seeds of the images: {others}" if others else "all from generators on the CPU"
        return Finding(not others and watch.seeded > 0, detail)

    def _changes(self, **changes: Any) -> Finding:
        before = self.trial.request(self.plain)
        after = self.trial.request(self.plain, **changes)
        return self._unequal(self.trial.draw(before), self.trial.draw(after), f"another {next(iter(changes))}")

    # --- references -----------------------------------------------------------------------------------------------

    def _references_change_image(self, mode: Mode) -> Finding:
        if len(self.trial.references) < 2:
            return Finding(None, "one picture is too few to compare")
        request = self.trial.request(mode, references=1)
        other = replace(request, references=self.trial.references[-1:])
        return self._unequal(self.trial.draw(request), self.trial.draw(other), "another reference")

    def _weighed(self, mode: Mode, second: float) -> ImageRequest:
        """A request with two references, the second with this weight."""
        first, other = self.trial.references[:2]
        return replace(self.trial.request(mode, references=2), references=(first, replace(other, weight=second)))

    def _weighs(self, mode: Mode) -> bool:
        return mode is Mode.IMAGE_PROMPT or self.trial.capabilities.weighs_references

    def _cannot_weigh(self, mode: Mode) -> Finding | None:
        if self.trial.capabilities.max_references < 2 or self.most < 2:
            return Finding(None, "one reference has no weight")
        return None if self._weighs(mode) else Finding(None, "weights decide only the order of references")

    def _equals_left_out(self, mode: Mode, *, weight: float) -> Finding:
        if self.trial.capabilities.max_references < 2 or self.most < 2:
            return Finding(None, "one reference has no weight")
        return self._equal(
            self.trial.draw(self._weighed(mode, weight)),
            self.trial.draw(self.trial.request(mode, references=1)),
            f"weight {weight:g}, and without the reference",
        )

    def _tiny_weight_fades(self, mode: Mode) -> Finding:
        return self._cannot_weigh(mode) or self._equals_left_out(mode, weight=TINY_WEIGHT)

    def _scale_0_leaves_out(self, mode: Mode) -> Finding:
        if not self._weighs(mode):
            return Finding(None, "the scale has no effect on this model")
        if self.plain is not Mode.NONE:
            return Finding(None, "the model draws nothing without a reference")
        without = self.trial.request(Mode.NONE, ip_adapter_scale=0.0)
        return self._equal(
            self.trial.draw(self._with_references(mode, ip_adapter_scale=0.0)),
            self.trial.draw(without),
            "scale 0, and without references",
        )

    def _weights_are_monotone(self, mode: Mode) -> Finding:
        if skipped := self._cannot_weigh(mode):
            return skipped
        images = [self.trial.draw(self._weighed(mode, weight)) for weight in WEIGHTS]
        effects = [float(np.abs(image - images[0]).mean()) for image in images]
        slack = NOT_MONOTONE * max(effects)
        rises = all(after >= before - slack for before, after in pairwise(effects))
        shown = ", ".join(f"{weight:g}: {effect:.4f}" for weight, effect in zip(WEIGHTS, effects, strict=True))
        return Finding(rises and effects[-1] > 0, f"mean distance from weight 0 by weight: {shown}")

    # --- batches and nested calls ---------------------------------------------------------------------------------

    def _rows(self, mode: Mode) -> Sequence[ImageRequest]:
        """Requests that differ as much as a call of this model allows: in everything, or in their seeds only."""
        count = min(3, self.trial.capabilities.max_batch_size)
        first = self._with_references(mode)
        other_references = tuple(reversed(first.references))
        mixed = [
            replace(first, prompt=prompt, seed=seed, references=references)
            for seed, (prompt, references) in enumerate(
                [(SHORT, first.references), (LONG, other_references), (self.trial.prompt, first.references)][:count]
            )
        ]
        if len({self.trial.model.batch_key(request) for request in mixed}) == 1:
            return mixed
        return [replace(first, seed=seed) for seed in range(count)]

    def _alone_equals_batched(self, mode: Mode) -> Finding:
        rows = self._rows(mode)
        if len(rows) == 1:
            return Finding(None, "this model draws one image per call")
        together = self.trial.draw(*rows)
        alone = np.concatenate([self.trial.draw(row) for row in rows])
        differ = "prompts, references and seeds" if rows[0].prompt != rows[1].prompt else "seeds"
        return self._equal(together, alone, f"{len(rows)} images with other {differ}")

    def _interrupted_equals_alone(self, mode: Mode) -> Finding:
        """Another image is drawn between two steps of this one, in the next mode that the model offers."""
        if not self.trial.capabilities.reports_steps:
            return Finding(None, NO_STEPS)
        if self.trial.capabilities.interruption_changes_images:
            return Finding(None, "the probe found that it changes images, so no batch is interrupted")
        modes = self.trial.modes
        outer = self._with_references(mode)
        inner = self._with_references(modes[(modes.index(mode) + 1) % len(modes)], seed=1, prompt=LONG)
        inside: list[np.ndarray] = []

        def draw_between(step: int, _steps: int) -> bool:
            if step == 1:
                inside.append(self.trial.draw(inner))
            return True

        outside = self.trial.draw(outer, on_step=draw_between)
        found = self._equal(
            np.concatenate([outside, *inside]),
            np.concatenate([self.trial.draw(outer), self.trial.draw(inner)]),
            f"an image in mode {inner.mode.value} between two steps",
        )
        return replace(found, passed=found.passed and bool(inside))

    # --- what the capabilities offer ------------------------------------------------------------------------------

    def _schedulers_draw(self) -> Finding:
        names = self.trial.capabilities.schedulers
        if not names:
            return Finding(None, "the model offers no other scheduler")
        failed = []
        for name in names:
            try:
                with RandomNumberWatch() as watch:
                    self.trial.draw(self.trial.request(self.plain, scheduler=name))
            except (BaseAppException, *REFUSALS) as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
            else:
                failed += [f"{name}: draws with {other}, not from the seeds" for other in sorted(watch.others)]
        return Finding(not failed, "; ".join(failed or names))

    def _loras_change_image(self) -> Finding:
        names = self.trial.capabilities.loras
        if not names:
            return Finding(None, "the settings have no LoRA")
        without = self.trial.draw(self.trial.request(self.plain))
        found = [
            self._unequal(self.trial.draw(self.trial.request(self.plain, loras=((name, 1.0),))), without, name)
            for name in names
        ]
        weakest = min(found, key=lambda each: each.difference or 0)
        return replace(weakest, detail=f"the least of {len(names)}: {weakest.detail}")

    def _other_sizes_draw(self) -> Finding:
        capabilities = self.trial.capabilities
        width, height = capabilities.native_width, capabilities.native_height
        wanted = [(width * 4 // 3, height * 3 // 4), (width * 3 // 4, height * 4 // 3)]
        sizes = {drawable_size(capabilities, *size) for size in wanted} - {(width, height)}
        if not sizes:
            return Finding(None, "the model draws its native size only")
        for wide, high in sorted(sizes):
            self.trial.draw(self.trial.request(self.plain, width=wide, height=high))
        return Finding(True, ", ".join(f"{wide} x {high}" for wide, high in sorted(sizes)))

    def previews(self) -> Previews:
        """Whether the model shows unfinished images, and how large, or why not."""
        shown = Shown()
        request = self.trial.request(self.plain, preview_listener=shown)
        self.trial.draw(request)
        if shown.sizes:
            return Previews(
                available=True,
                detail=f"{shown.sizes[0]} pixels, {len(shown.sizes)} in {request.num_inference_steps} steps",
            )
        model = self.trial.model
        if isinstance(model, Diffusion) and Previewer.of(model.text_to_image, [request]) is None:
            return Previews(available=False, detail="the VAE names no scale of its latents")
        return Previews(available=False, detail="the latents of this pipeline have a form that is not known")

    def _previews_change_nothing(self) -> Finding:
        shown = Shown()
        request = self.trial.request(self.plain)
        found = self._equal(
            self.trial.draw(replace(request, preview_listener=shown)),
            self.trial.draw(request),
            f"with {len(shown.sizes)} previews, and without",
        )
        return replace(found, detail=f"with {len(shown.sizes)} previews, and without")

    # --- cancel ---------------------------------------------------------------------------------------------------

    def _cancel_stops(self) -> Finding:
        """Stop a call in its middle, and wait until the device has no work left."""
        if not self.trial.capabilities.reports_steps:
            return Finding(None, NO_STEPS)
        request = self.trial.request(self.plain, num_inference_steps=CANCEL_STEPS)
        self.trial.draw(request)
        started = time.perf_counter()
        self.trial.draw(request)
        step_s = (time.perf_counter() - started) / CANCEL_STEPS
        asked: list[float] = []

        def stop_in_the_middle(step: int, steps: int) -> bool:
            if step < steps // 2:
                return True
            asked.append(time.perf_counter())
            return False

        try:
            self.trial.draw(request, on_step=stop_in_the_middle)
        except CallStopped:
            if self.trial.device.type == "cuda":
                torch.cuda.synchronize(self.trial.device)
            stopped_s = time.perf_counter() - asked[0]
            allowed_s = STOP_STEPS * step_s + STOP_S
            return Finding(
                len(asked) == 1 and stopped_s <= allowed_s,
                f"ended after {stopped_s:.3f} s; a step takes {step_s:.3f} s",
            )
        return Finding(False, "the call drew on to its end")


def probe_verdict(trial: Trial) -> list[str]:
    """The verdict of the probe at start, in sentences."""
    known = trial.capabilities
    verdict = []
    if not known.reports_steps:
        repeated = "another image" if known.repeating_changes_images else "the same image"
        company = "changes" if known.batching_changes_images else "does not change"
        return [f"A repeated request gives {repeated}.", f"An image {company} when others are drawn beside it."]
    if known.batching_changes_images:
        verdict.append("The other images of a batch change an image, so each image has its own call.")
    elif known.max_batch_size < trial.settings.max_batch_size:
        verdict.append("The pipeline refuses calls of several images, so each image has its own call.")
    elif known.max_batch_size > 1:
        verdict.append("A batch changes no image beyond rounding.")
    if known.interruption_changes_images:
        verdict.append("A call between two steps changes an image, so no batch is interrupted.")
    else:
        verdict.append("A call between two steps changes no image.")
    return verdict
