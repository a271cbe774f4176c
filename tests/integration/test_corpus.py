"""The corpus in the database: nearest images, filters, deletion, claims of images, and the choice of references."""

from datetime import timedelta
from uuid import uuid4

import numpy as np
import pytest
from sqlalchemy import event, func, select, text, update
from sqlalchemy.orm import Session

from shared import retrieval
from shared.contracts.generation import PinnedReference
from shared.contracts.search import ImageFilter
from shared.db import collections, images, owners, spaces
from shared.db.collections import Principal
from shared.db.images import ImageClaim, Nearest, Vector
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Collection, Image
from shared.errors import ReferenceUnavailableError, ResourceNotFoundError
from shared.settings import RetrievalSettings
from tests.factories import DIM, SHARED_COLLECTION, make_image, make_space


def axis(number: int, towards: int | None = None, by: float = 0.0) -> Vector:
    """The unit vector along one axis, leaning by an angle (radians) towards another."""
    vector = np.zeros(DIM, np.float32)
    vector[number] = np.cos(by)
    if towards is not None:
        vector[towards] = np.sin(by)
    return vector


def nearest(
    session: Session,
    space: Space,
    vector: Vector,
    *,
    k: int = 10,
    exact_below: int = 10_000,
    ef_search: int = 100,
    **where: object,
) -> Nearest:
    return images.nearest(
        session,
        space,
        vector,
        k=k,
        collection_id=SHARED_COLLECTION,
        where=ImageFilter.model_validate(where),
        ef_search=ef_search,
        exact_below=exact_below,
    )


@pytest.mark.parametrize("exact_below", [10_000, 0])
def test_the_nearest_images_come_first_with_their_cosine_similarity(session: Session, exact_below: int) -> None:
    space = make_space(session)
    by = {angle: make_image(session, vector=5 * axis(0, 1, angle)) for angle in (0.9, 0.1, 0.5)}
    found = nearest(session, space, axis(0), k=3, exact_below=exact_below)
    assert found.exact == bool(exact_below)
    assert [f.image.id for f in found.images] == [by[angle].id for angle in (0.1, 0.5, 0.9)]
    assert [f.similarity for f in found.images] == pytest.approx(np.cos([0.1, 0.5, 0.9]), abs=2e-3)
    assert found.images[0].norm == pytest.approx(5, rel=1e-3)


def test_an_image_without_a_vector_or_of_another_collection_is_not_found(session: Session) -> None:
    space = make_space(session)
    other = collections.ensure(session, "mine", owner_id=owners.ensure(session, "somebody"))
    make_image(session)
    make_image(session, vector=axis(0), collection_id=other.id)
    assert nearest(session, space, axis(0)).images == []


def test_every_condition_of_a_filter_must_hold(session: Session) -> None:
    space = make_space(session)
    wanted = make_image(
        session,
        vector=axis(0, 1, 0.5),
        tags=["fruit", "red"],
        source="noto",
        licence="MIT",
        attributes={"style": "flat", "set": "a"},
    )
    make_image(session, vector=axis(0), tags=["fruit"], source="noto", licence="MIT", attributes={"style": "3d"})
    for where in (
        {"tags": ["red", "fruit"]},
        {"attributes": {"style": "flat"}},
        {"tags": ["fruit"], "source": "noto", "licence": "MIT", "attributes": {"set": "a"}},
    ):
        assert [f.image.id for f in nearest(session, space, axis(0), **where).images] == [wanted.id]
    assert nearest(session, space, axis(0), source="elsewhere").images == []


def test_a_filter_on_time_includes_its_start_and_excludes_its_end(session: Session) -> None:
    space = make_space(session)
    image = make_image(session, vector=axis(0))
    at = image.created_at
    assert nearest(session, space, axis(0), created_after=at).images
    assert not nearest(session, space, axis(0), created_before=at).images
    assert nearest(session, space, axis(0), created_before=at + timedelta(seconds=1)).images


def test_an_indexed_search_with_a_selective_filter_finds_enough_images(session: Session) -> None:
    """Without an iterative scan HNSW reads `ef_search` rows, and the filter removes almost all of them."""
    space = make_space(session)
    random = np.random.default_rng(0)
    for number in range(300):
        make_image(session, vector=random.normal(size=DIM), tags=["rare"] if number % 50 == 0 else ["common"])
    # For so few rows the planner would sort. The test needs the index.
    for setting in ("enable_seqscan", "enable_bitmapscan", "enable_sort"):
        session.execute(text(f"set local {setting} = off"))
    found = nearest(session, space, axis(0), k=6, exact_below=0, ef_search=10, tags=["rare"])
    assert not found.exact
    assert len(found.images) == 6


def test_a_deleted_image_is_not_found_again_and_its_vector_is_deleted(session: Session) -> None:
    space = make_space(session)
    image = make_image(session, vector=axis(0))
    version = session.scalars(select(Collection.version).where(Collection.id == SHARED_COLLECTION)).one()
    images.remove(session, image)
    assert nearest(session, space, axis(0)).images == []
    assert session.scalar(select(func.count()).select_from(space.table)) == 0
    assert session.scalars(select(Collection.version).where(Collection.id == SHARED_COLLECTION)).one() == version + 1


def test_a_vector_that_arrives_after_its_image_was_deleted_is_dropped(session: Session) -> None:
    space = make_space(session)
    image = make_image(session)
    images.remove(session, image)
    assert images.store_embeddings(session, space, [ImageClaim.of(image)], axis(0)[None], np.ones(1, np.float32)) == []
    assert session.scalar(select(func.count()).select_from(space.table)) == 0


def test_equal_content_is_one_image_per_collection(session: Session) -> None:
    first = make_image(session, sha256="ab" * 32)
    assert make_image(session, sha256="ab" * 32).id == first.id
    other = collections.ensure(session, "mine", owner_id=owners.ensure(session, "somebody"))
    assert make_image(session, sha256="ab" * 32, collection_id=other.id).id != first.id


def test_an_image_that_is_deleted_while_its_content_is_added_again_is_added(session: Session) -> None:
    old = make_image(session, sha256="ab" * 32).id
    session.commit()

    def delete_it(*_: object) -> None:
        with session_scope() as other:
            images.remove(other, other.get_one(Image, old))

    # Between the insert, which finds the content in the table, and the select of that row.
    connection = session.connection()
    event.listen(connection, "after_cursor_execute", delete_it, once=True)
    assert make_image(session, sha256="ab" * 32).id != old


def test_a_failed_image_becomes_pending_when_it_is_uploaded_again(session: Session) -> None:
    image = make_image(session, sha256="ab" * 32)
    session.execute(update(Image).values(crashes=3))
    assert images.mark_embedding_failed(session, make_space(session), ImageClaim.of(image), code="invalid_image")
    again = make_image(session, sha256="ab" * 32)
    assert (again.id, again.state, again.error_code, again.crashes) == (image.id, "pending", None, 0)
    assert images.any_pending(session)


def test_a_pending_image_is_claimed_once_and_again_after_its_lease_has_expired(
    session: Session,
) -> None:
    image = make_image(session)
    assert images.any_pending(session)
    first = claim(session, image)
    assert images.claim_pending(session, limit=5, lease_s=30) == []
    assert not images.any_pending(session)
    let_leases_expire(session)
    assert images.renew(session, [first], lease_s=30) == {image.id}
    assert images.take_back_expired(session, max_crashes=3) == [], "renewed in time"
    let_leases_expire(session)
    assert images.take_back_expired(session, max_crashes=3) == [(image.id, "pending")]
    assert claim(session, image).attempt == first.attempt + 1


def test_an_attempt_that_lost_its_image_can_write_nothing(session: Session) -> None:
    space, image = make_space(session), make_image(session)
    first = claim(session, image)
    let_leases_expire(session)
    images.take_back_expired(session, max_crashes=3)
    second = claim(session, image)

    assert images.renew(session, [first], lease_s=30) == set()
    assert images.mark_model_started(session, [first]) == set()
    assert not images.mark_embedding_failed(session, space, first, code="embedding_failed")
    assert images.store_embeddings(session, space, [first], axis(0)[None], np.ones(1, np.float32)) == []
    assert images.hand_back(session, [first]) == 0
    assert images.store_embeddings(session, space, [second], axis(0)[None], np.ones(1, np.float32)) == [image.id]


def test_only_crashes_in_the_model_count_and_the_third_fails_the_image(session: Session) -> None:
    image = make_image(session)
    for crashed_in_model, expected in [(False, 0), (True, 1), (True, 2)]:
        claimed = claim(session, image)
        if crashed_in_model:
            assert images.mark_model_started(session, [claimed]) == {image.id}
        let_leases_expire(session)
        assert images.take_back_expired(session, max_crashes=3) == [(image.id, "pending")]
        session.refresh(image)
        assert image.crashes == expected
    images.mark_model_started(session, [claim(session, image)])
    let_leases_expire(session)
    assert images.take_back_expired(session, max_crashes=3) == [(image.id, "failed")]
    session.refresh(image)
    assert (image.state, image.error_code, image.lease_until) == ("failed", "embedding_crashed", None)
    assert not images.any_pending(session)


def test_an_image_that_crashed_a_process_is_claimed_in_isolation_and_in_order(session: Session) -> None:
    some = [make_image(session) for _ in range(4)]
    for position, image in enumerate(some):
        session.execute(
            update(Image)
            .where(Image.id == image.id)
            .values(created_at=func.now() + timedelta(seconds=position), crashes=int(position == 1))
        )
    claimed = [[image.id for image in images.claim_pending(session, limit=3, lease_s=30)] for _ in range(3)]
    assert claimed == [[some[0].id, some[2].id], [some[1].id], [some[3].id]]


def test_images_handed_back_can_be_claimed_at_once_and_did_not_crash(session: Session) -> None:
    image = make_image(session)
    claimed = claim(session, image)
    images.mark_model_started(session, [claimed])
    assert images.hand_back(session, [claimed]) == 1
    claim(session, image)
    let_leases_expire(session)
    images.take_back_expired(session, max_crashes=3)
    session.refresh(image)
    assert image.crashes == 0


def claim(session: Session, image: Image) -> ImageClaim:
    (claimed,) = images.claim_pending(session, limit=5, lease_s=30)
    assert claimed.id == image.id
    return ImageClaim.of(claimed)


def let_leases_expire(session: Session) -> None:
    past = func.now() - timedelta(seconds=1)
    session.execute(update(Image).where(Image.lease_until.is_not(None)).values(lease_until=past))


def test_a_space_is_registered_once_and_the_first_one_is_active(session: Session) -> None:
    first = make_space(session, dim=8)
    assert make_space(session, dim=8) == first
    second = make_space(session, dim=12)
    assert second.table.name != first.table.name
    assert spaces.find_active(session) == first


def test_a_collection_is_found_by_its_own_owner_and_the_shared_one_by_all(session: Session) -> None:
    mine, other = (Principal(owners.ensure(session, name)) for name in ("me", "other"))
    collection = collections.ensure(session, "private", owner_id=mine.owner_id)
    image = make_image(session, collection_id=collection.id)
    assert collections.get_by_name(session, "private", principal=mine).id == collection.id
    assert collections.get_by_name(session, "me/private", principal=mine).id == collection.id
    assert collections.get_by_name(session, "shared", principal=other).id == SHARED_COLLECTION
    for name in ("private", "me/private", "other/private", "me/shared"):
        assert collections.find_by_name(session, name, principal=other) is None, name
    with pytest.raises(ResourceNotFoundError):
        images.get(session, image.id, principal=other)


# --- choosing references ------------------------------------------------------------------------------------------


def plan(session: Session, space: Space) -> list[retrieval.Candidate]:
    query = retrieval.ConceptQuery("any", [axis(0)], SHARED_COLLECTION, ImageFilter())
    gate = retrieval.Gate(0.5)
    return retrieval.plan_concepts(session, space, [query], most=3, gate=gate, settings=RetrievalSettings()).candidates


def test_references_below_min_similarity_are_listed_but_not_used(session: Session) -> None:
    space = make_space(session)
    near, far = make_image(session, vector=axis(0, 1, 0.2)), make_image(session, vector=axis(0, 2, 1.3))
    references = plan(session, space)
    assert [(r.scored.image.id, r.used) for r in references] == [(near.id, True), (far.id, False)]
    assert [r.weight for r in references] == [1.0, 0.0]
    assert "below 0.5" in references[1].reason


def test_weights_rise_with_similarity_and_sum_to_one(session: Session) -> None:
    space = make_space(session)
    for angle, other in ((0.2, 1), (0.5, 2), (0.8, 3)):
        make_image(session, vector=axis(0, other, angle))
    weights = [reference.weight for reference in plan(session, space)]
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) > 0


def test_only_one_of_near_duplicates_is_used_and_other_images_move_up(session: Session) -> None:
    space = make_space(session)
    kept = make_image(session, vector=axis(0, 1, 0.10))
    make_image(session, vector=axis(0, 1, 0.11))
    make_image(session, vector=axis(0, 1, 0.12))
    others = [make_image(session, vector=axis(0, number, 0.6)) for number in (2, 3)]
    found = {reference.scored.image.id for reference in plan(session, space)}
    assert found == {kept.id, *(other.id for other in others)}


def test_pictures_that_differ_only_in_colour_are_not_duplicates(session: Session) -> None:
    """A red and a green apple have the same brightness gradients, and so the same perceptual hash."""
    space = make_space(session)
    for number in (1, 2):
        make_image(session, vector=axis(0, number, 0.5), perceptual_hash=77)
    assert len(plan(session, space)) == 2


def test_pinned_references_are_used_in_their_order_with_their_weights(session: Session) -> None:
    space = make_space(session)
    first, second = make_image(session, vector=axis(5)), make_image(session, vector=axis(0))
    pinned = [PinnedReference(image_id=first.id, weight=3), PinnedReference(image_id=second.id)]
    references = retrieval.plan_pinned(session, space, pinned, axis(0)).candidates
    assert [(r.scored.image.id, r.weight, r.used) for r in references] == [
        (first.id, 0.75, True),
        (second.id, 0.25, True),
    ]
    assert [r.scored.similarity for r in references] == pytest.approx([0, 1], abs=2e-3)


def test_a_reference_that_a_request_only_kept_is_not_marked_as_pinned(session: Session) -> None:
    space = make_space(session)
    chosen, kept = make_image(session, vector=axis(5)), make_image(session, vector=axis(0))
    references = [PinnedReference(image_id=chosen.id), PinnedReference(image_id=kept.id, pinned=False)]
    used = retrieval.plan_pinned(session, space, references, axis(0)).candidates
    assert [(each.pinned, each.reason) for each in used] == [
        (True, "pinned by the request"),
        (False, "found by the search and kept by the request"),
    ]


def test_a_weight_of_zero_is_not_taken_for_an_unset_one(session: Session) -> None:
    """The share of a picture with a very small weight is rounded to 0, and a replay plans it again."""
    space = make_space(session)
    image = make_image(session, vector=axis(0))
    (scored,) = images.find_by_ids(session, space, [image.id], axis(0)).values()
    plan = retrieval.plan_pinned(session, space, [], axis(0), sent=[(scored, None), (scored, 0.0)])
    assert [reference.weight for reference in plan.candidates] == [1.0, 0.0]


def test_a_pinned_reference_that_is_unknown_or_not_embedded_is_refused_by_name(session: Session) -> None:
    space = make_space(session)
    waiting, gone = make_image(session).id, uuid4()
    for missing in (waiting, gone):
        with pytest.raises(ReferenceUnavailableError) as refused:
            retrieval.plan_pinned(session, space, [PinnedReference(image_id=missing)], None)
        assert refused.value.context == {"image_ids": [str(missing)]}


def test_diversity_prefers_different_images_over_similar_ones(session: Session) -> None:
    space = make_space(session)
    best = make_image(session, vector=axis(0, 1, 0.1))
    alike = make_image(session, vector=axis(0, 1, 0.2))
    different = make_image(session, vector=axis(0, 2, 0.4))
    found = nearest(session, space, axis(0)).images
    chosen = {d: [f.image.id for f in retrieval.diversify(found, k=2, diversity=d)] for d in (0.0, 0.6)}
    assert chosen == {0.0: [best.id, alike.id], 0.6: [best.id, different.id]}


@pytest.mark.parametrize("exact_below", [10_000, 0])
def test_images_come_in_the_order_of_their_similarity(session: Session, exact_below: int) -> None:
    space = make_space(session)
    random = np.random.default_rng(7)
    base = random.normal(size=DIM)
    for _ in range(400):
        make_image(session, vector=(base + 0.03 * random.normal(size=DIM)).astype(np.float32))
    for name in ("sort", "hashjoin", "mergejoin"):  # so few images would be sorted and not taken from the index
        session.execute(text(f"set local enable_{name} = off"))
    for number in range(4):
        query = base + 0.03 * random.normal(size=DIM)
        unit = (query / np.linalg.norm(query)).astype(np.float32)
        found = nearest(session, space, unit, k=100, exact_below=exact_below).images
        similarities = [each.similarity for each in found]
        assert len(found) == 100, number
        assert similarities == sorted(similarities, reverse=True), number


def test_equally_similar_images_come_in_a_fixed_order(session: Session) -> None:
    space = make_space(session)
    made = sorted(make_image(session, vector=axis(0)).id for _ in range(8))
    assert [each.image.id for each in nearest(session, space, axis(0), k=5).images] == made[:5]
