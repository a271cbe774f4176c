"""The story of a job: embed the prompt, retrieve references, generate images conditioned on them, store, finish.

`run_job` is the whole story; the other modules of this folder are its parts.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from uuid import UUID

import numpy as np

from shared import retrieval, tracing
from shared.capabilities import check_parameters, drawable_size, resolve_mode
from shared.concepts import searched_texts, wordings
from shared.contracts.generation import GenerationParameters, Mode
from shared.db import collections, images, spaces
from shared.db.collections import Principal
from shared.db.images import ScoredImage
from shared.db.session import session_scope
from shared.errors import (
    ReferenceDeletedError,
    ReferenceUnavailableError,
    UnsupportedSizeError,
)
from shared.settings import Settings
from shared.vectors import l2_normalised
from worker_service.jobs import job_warnings, moderation, outputs, reference_images, replay
from worker_service.jobs.attempt import Attempt, Outcome, SpaceInactiveError, claimed
from worker_service.jobs.leases import JobLeases
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.worker_models import Models

STAGES = ("embed", "retrieve", "load_references", "generate", "store")
"""The stages of every job. A content policy adds `moderate`."""


def run_job(job_id: UUID, *, models: Models, leases: JobLeases, settings: Settings, worker: str) -> Outcome:
    """Run one job and return how this attempt ended. worker: id of this process.

    Safe to call twice: only one attempt can own the job, and only the owner can publish outputs.

    Raises:
        DatabaseError: the database failed. The reconciler then returns the job to the queue.
    """
    with claimed(job_id, leases=leases, settings=settings.jobs, worker=worker) as attempt:
        if attempt is None:
            return Outcome.SKIPPED

        check_capabilities(attempt.parameters, models=models)
        with attempt.counting_crashes(models.crash_isolation_lock):
            # 1. Embed the prompt, check it against the content policy, and retrieve references from the corpus.
            with attempt.stage("embed"):
                moderation.check_prompt(attempt, models.policy)
                embeds = needs_references(attempt.parameters)
                vectors = models.embed_texts(query_texts(attempt.parameters)) if embeds else None
                sent = [] if vectors is None else reference_images.embed(attempt, vectors[0], models=models)
            with attempt.stage("retrieve"):
                plan = retrieve(attempt, vectors, sent, models=models, settings=settings)

            # 2. Decide how the references condition the image, load them, and append the event `resolved`.
            with tracing.span("resolve"):
                used = [candidate for candidate in plan.candidates if candidate.used]
                mode, reason = resolve_mode(
                    models.capabilities,
                    attempt.parameters.mode,
                    references=len(used),
                    captions=sum(candidate.scored.image.caption is not None for candidate in used),
                    pinned=any(candidate.pinned for candidate in used) and attempt.parameters.planned_at is None,
                )
                references = outputs.load_references(used, with_pixels=False)
                requests = image_requests(attempt, mode, references, models=models)
                differences = job_warnings.differences(
                    requests[0],
                    used,
                    unread=models.image_model.unread_texts(requests[0]),
                    # A replay and a plan pin what a search has chosen: those weights are no wish of a request.
                    weighed=models.capabilities.weighs_references
                    or attempt.replay_of is not None
                    or attempt.parameters.planned_at is not None,
                )
            try:  # a reference that cannot be loaded is in the event, too
                with attempt.stage("load_references"):
                    if models.needs_pixels(mode):
                        pixels = tuple(outputs.load_references(used, with_pixels=True))
                        requests = [replace(request, references=pixels) for request in requests]
            finally:
                event = outputs.resolved_event(mode, reason, plan, space=models.space, warnings=differences)
                attempt.record_resolution(event)

        # 3. Generate: one request per image, in whatever batches they fit.
        with models.crash_isolation_lock if attempt.isolated else nullcontext():
            with attempt.stage("generate"):
                images = models.generate(requests, attempt.submission())
            attempt.record_degradation([image.memory_savers for image in images])

            # 4. Store the images that the policy allows, then publish them and end the job in one transaction.
            allowed = moderation.apply_policy(attempt, images, models.policy)
            with attempt.stage("store"):
                stored = outputs.store(
                    attempt, mode, reason, plan, requests, allowed, warnings=differences, models=models
                )
                replay.compare(attempt, stored)
            attempt.finish(stored)
    return attempt.outcome


def check_capabilities(parameters: GenerationParameters, *, models: Models) -> None:
    """Reject parameters that the loaded model does not support.

    The API makes the same check, but only once a worker has published the model's capabilities.

    Raises:
        UnsupportedModeError: the model does not have the mode.
        UnsupportedParameterError: the model does not have the scheduler or a LoRA, takes fewer references, or takes no
            negative prompt.
        UnsupportedSizeError: `exact_size` is set, and the model cannot generate the size.
    """
    check_parameters(
        models.capabilities,
        mode=parameters.mode,
        scheduler=parameters.scheduler,
        loras=parameters.loras,
        references=parameters.named_references,
        negative_prompt=parameters.negative_prompt,
    )
    size = (parameters.width, parameters.height)
    if parameters.exact_size and drawable_size(models.capabilities, *size) != size:
        raise UnsupportedSizeError(width=parameters.width, height=parameters.height)


def needs_references(parameters: GenerationParameters) -> bool:
    """Whether the job retrieves references, or its request names or brings them."""
    return parameters.mode is not Mode.NONE and (parameters.k > 0 or parameters.named_references > 0)


def query_texts(parameters: GenerationParameters) -> list[str]:
    """The texts by which references are compared, each once.

    They are the texts of all concepts (`searched_texts`) and the wordings of the texts to avoid, or the prompt for
    references that the request names.
    """
    if parameters.named_references:
        return [parameters.prompt]
    of_concepts = [text for concept in parameters.searched_concepts for text in searched_texts(concept.text)]
    return list(dict.fromkeys([*of_concepts, *(wording for text in parameters.avoid for wording in wordings(text))]))


def retrieve(
    attempt: Attempt, vectors: np.ndarray | None, sent: Sequence[ScoredImage], *, models: Models, settings: Settings
) -> retrieval.Plan:
    """Candidate references for the prompt, with the decision on each; empty without vectors.

    vectors: CLIP's projections of `query_texts`, shape (n, dim), float32, not normalised. None: the job needs no
    references. sent: pictures of the request.

    Raises:
        ReferenceDeletedError: a pinned image was deleted since the submit, or is not shared with the owner any more.
        CollectionUnavailableError: the same is true of the collection.
        SpaceInactiveError: this worker's CLIP is not the one of the active embedding space.
    """
    parameters = attempt.parameters
    if vectors is None:
        return retrieval.Plan([], [])
    unit_vectors = l2_normalised(vectors)
    principal = Principal(attempt.owner_id)
    with session_scope() as session:
        space = spaces.find_active(session)
        if space is None or space != models.space:
            raise SpaceInactiveError
        if parameters.named_references:
            # The owner may have lost the access to a collection since the submit.
            pinned = [each.image_id for each in parameters.references]
            visible = images.filter_searchable(session, space, pinned, principal=principal)
            if missing := [str(image_id) for image_id in pinned if image_id not in visible]:
                raise ReferenceDeletedError(image_ids=missing)
            weights = [each.weight for each in parameters.reference_images]
            weighted = list(zip(sent, weights, strict=True))
            try:
                return retrieval.plan_pinned(
                    session,
                    space,
                    parameters.references,
                    unit_vectors[0],
                    sent=weighted,
                    concepts=[concept.text for concept in parameters.concepts],
                    kept_reason="found by the search and kept by the request"
                    if parameters.planned_at is None
                    else "chosen by the request's plan",
                )
            except ReferenceUnavailableError as error:
                raise ReferenceDeletedError(**error.context) from error
        queries, of_text = [], dict(zip(query_texts(parameters), unit_vectors, strict=True))
        for concept in parameters.searched_concepts:
            where = concept.filter or parameters.filter
            collection = collections.get_by_name(session, where.collection, principal=principal)
            queries.append(
                retrieval.ConceptQuery.of(concept.text, of_text, collection_id=collection.id, where=where, k=concept.k)
            )
        return retrieval.plan_concepts(
            session,
            space,
            queries,
            most=min(parameters.k, models.capabilities.max_references),
            gate=retrieval.Gate(parameters.min_similarity, parameters.max_gap, parameters.matched_min_similarity),
            settings=settings.retrieval,
            mode=parameters.search_mode,
            avoided=retrieval.Avoided(
                {wording: of_text[wording] for text in parameters.avoid for wording in wordings(text)},
                frozenset(parameters.avoid_ids),
            ),
        )


def image_requests(
    attempt: Attempt, mode: Mode, references: Sequence[Reference], *, models: Models
) -> list[ImageRequest]:
    """One request per seed. They differ in the seed only, so that the images of a job can share a batch."""
    parameters = attempt.parameters
    width, height = drawable_size(models.capabilities, parameters.width, parameters.height)
    return [
        ImageRequest.of(
            parameters,
            prompt=parameters.prompt,
            negative_prompt=parameters.negative_prompt,
            seed=seed,
            width=width,
            height=height,
            loras=parameters.loras,
            output_size=(parameters.width, parameters.height),
            mode=mode,
            references=references if mode is not Mode.NONE else (),
            preview_listener=None if models.policy.can_change_images else attempt.preview_listener(index),
        )
        for index, seed in enumerate(parameters.seeds)
    ]
