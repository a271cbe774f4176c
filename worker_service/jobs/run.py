"""The story of a job: embed the prompt, retrieve references, generate images conditioned on them, store, finish."""

from collections.abc import Sequence
from contextlib import nullcontext
from uuid import UUID

import numpy as np

from shared import retrieval
from shared.capabilities import check_parameters, drawable_size, resolve_mode
from shared.contracts.generation import GenerationParameters, Mode
from shared.db import images, spaces
from shared.db.session import session_scope
from shared.errors import (
    EmbeddingUnavailableError,
    ReferenceDeletedError,
    ReferenceUnavailableError,
    UnsupportedSizeError,
)
from shared.settings import Settings
from worker_service.jobs import moderation, outputs, replay
from worker_service.jobs.attempt import Attempt, Outcome, claimed
from worker_service.jobs.leases import Leases
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.loaded import Models


def run(job_id: UUID, *, models: Models, leases: Leases, settings: Settings, worker: str) -> Outcome:
    """Run one job. Safe to call twice: only one attempt can own the job, and only its owner can publish."""
    with claimed(job_id, leases=leases, settings=settings.jobs, worker=worker) as job:
        if job is None:
            return Outcome.NOT_OURS

        # 1. Embed the prompt, ask the content policy about it, and find what the corpus remembers of it.
        check(job.parameters, models=models)
        with job.stage("embed"):
            moderation.admit(job, models.policy)
            vector = models.embed_text(job.parameters.prompt) if looks_for_references(job.parameters) else None
        with job.stage("retrieve"):
            references = retrieve(job, vector, models=models, settings=settings)

        # 2. Decide how they condition the image, and say so before the long part begins.
        used = [reference for reference in references if reference.used]
        mode, reason = resolve_mode(
            models.capabilities,
            job.parameters.mode,
            references=len(used),
            captions=sum(reference.found.image.caption is not None for reference in used),
            pinned=bool(job.parameters.references),
        )
        job.resolved(outputs.resolution(mode, reason, references, space=models.space))

        # 3. Generate: one request per image, in whatever batches they fit.
        with job.stage("load_references"):
            conditions = outputs.load_references(used, with_pixels=models.needs_pixels(mode))
        requests = image_requests(job, mode, conditions, models=models)
        # Of those that were there when a process died, one at a time, to its end: which of them killed it must not be
        # counted against the others again, while they store what they have drawn or wait for their next image.
        with models.suspects if job.crashes > 0 else nullcontext():
            with job.stage("generate"):
                drawn = models.draw(
                    requests,
                    lane=job.lane,
                    owner=job.owner_id,
                    check_in=job.check_in,
                    begin=job.model_starts,
                    held_up=job.held_up,
                    alone=job.crashes > 0,
                    job=str(job.id),
                )
            job.degraded([image.memory_savers for image in drawn])

            # 4. Store what the policy lets pass, then publish images and end of the job in one transaction.
            shown = moderation.fit_to_show(job, drawn, models.policy)
            with job.stage("store"):
                stored = outputs.store(job, mode, reason, used, requests, shown, models=models)
                replay.compare(job, stored)
            job.finish(stored)
    return job.outcome


def check(parameters: GenerationParameters, *, models: Models) -> None:
    """Refuse what the loaded model cannot do: the API could not know when no worker had told yet.

    Raises:
        UnsupportedModeError, UnsupportedParameterError, UnsupportedSizeError
    """
    check_parameters(
        models.capabilities,
        mode=parameters.mode,
        scheduler=parameters.scheduler,
        loras=parameters.loras,
        references=len(parameters.references),
        negative_prompt=parameters.negative_prompt,
    )
    asked = (parameters.width, parameters.height)
    if parameters.exact_size and drawable_size(models.capabilities, *asked) != asked:
        raise UnsupportedSizeError(width=parameters.width, height=parameters.height)


def looks_for_references(parameters: GenerationParameters) -> bool:
    return parameters.mode is not Mode.NONE and (parameters.k > 0 or bool(parameters.references))


def retrieve(
    job: Attempt, vector: np.ndarray | None, *, models: Models, settings: Settings
) -> Sequence[retrieval.Reference]:
    """The references of a job with the decision on each; none when it asked for none.

    vector: shape (dim,), float32, the prompt's projection, not normalised.

    Raises:
        ReferenceDeletedError: a pinned image was deleted since the submit.
        EmbeddingUnavailableError: this worker's CLIP is not the one that the corpus is embedded with (any more).
    """
    parameters = job.parameters
    if vector is None:
        return []
    unit = vector / np.linalg.norm(vector)
    with session_scope() as session:
        if spaces.find_active(session) != models.space:
            raise EmbeddingUnavailableError("This worker's CLIP is not that of the active embedding space.")
        if parameters.references:
            try:
                return retrieval.plan_pinned(session, models.space, parameters.references, unit)
            except ReferenceUnavailableError as error:
                raise ReferenceDeletedError(**error.context) from error
        return retrieval.plan(
            session,
            models.space,
            unit,
            k=min(parameters.k, models.capabilities.max_references),
            min_similarity=parameters.min_similarity,
            collection_id=images.get_collection(session, parameters.filter.collection, owner_id=job.owner_id).id,
            where=parameters.filter,
            settings=settings.retrieval,
        )


def image_requests(job: Attempt, mode: Mode, references: Sequence[Reference], *, models: Models) -> list[ImageRequest]:
    """One request per seed; alike but for the seed, so that a job's images can share a batch."""
    parameters = job.parameters
    width, height = drawable_size(models.capabilities, parameters.width, parameters.height)
    return [
        ImageRequest(
            prompt=parameters.prompt,
            negative_prompt=parameters.negative_prompt,
            seed=seed,
            width=width,
            height=height,
            num_inference_steps=parameters.num_inference_steps,
            guidance_scale=parameters.guidance_scale,
            scheduler=parameters.scheduler,
            loras=tuple(sorted(parameters.loras.items())),
            mode=mode,
            ip_adapter_scale=parameters.ip_adapter_scale,
            strength=parameters.strength,
            references=tuple(references) if mode is not Mode.NONE else (),
            onlooker=None if models.policy.withholds else job.onlooker(index),
        )
        for index, seed in enumerate(parameters.seeds)
    ]
