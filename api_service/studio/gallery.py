"""Studio's pages of outputs: browse, filter, download and delete them, and show one with its record."""

import zipfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from tempfile import SpooledTemporaryFile
from uuid import UUID

from flask import Response, current_app, g, request, send_file

from api_service import services
from api_service.http import problems
from api_service.studio.generation import create_values_of, form_key
from api_service.studio.pages import (
    IMAGES_PER_PAGE,
    page_blueprint,
    read_form,
    redirect_to,
    render_page,
    wants_fragment,
)
from shared.contracts.generation import Mode, PinnedReference
from shared.contracts.jobs import OutputView, ReferenceKind
from shared.contracts.outputs import OutputQuery, RememberRequest
from shared.errors import OutputWithdrawnError, ResourceNotFoundError
from shared.storage import get_blobs

studio_gallery = page_blueprint("studio_gallery")

FILTERS = ("words", "model", "mode", "reference_id", "job_id", "bulk_id", "created_after", "created_before")
MAX_SELECTED = 500
ARCHIVE_BYTES_IN_MEMORY = 16 * 2**20


@studio_gallery.get("/gallery")
def gallery() -> Response:
    query = read_form(OutputQuery, request.args, (*FILTERS, "cursor"), limit=IMAGES_PER_PAGE)
    page = services.outputs.list_page(query, caller=g.caller)
    return render_page(
        "gallery_page" if wants_fragment() else "gallery",
        active="gallery",
        outputs=page,
        items=_jobs_in_order(page.items),
        query=query,
        is_filtered=any(request.args.get(name) for name in FILTERS),
        models=[each.name for each in services.status.models().models],
        modes=[mode.value for mode in Mode if mode is not Mode.AUTO],
        periods=_periods(),
    )


def _periods() -> list[tuple[str, str]]:
    """Return the names of the times since when outputs can be shown, and the times. They stay equal for a day."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = {"yesterday": 1, "a week ago": 7, "a month ago": 30}
    return [(words, (today - timedelta(days=number)).isoformat()) for words, number in days.items()]


def _jobs_in_order(outputs: Iterable[OutputView]) -> list[OutputView]:
    """Return the outputs with those of a job together, by their index. The first output of a job gives its place."""
    by_job: dict[UUID, list[OutputView]] = {}
    for output in outputs:
        by_job.setdefault(output.job_id, []).append(output)
    return [output for of_job in by_job.values() for output in sorted(of_job, key=lambda each: each.index)]


@studio_gallery.post("/gallery/download")
def download() -> Response:
    """Send the selected outputs as a ZIP file. An output that is gone is left out."""
    selected = _selected()
    archive = SpooledTemporaryFile(max_size=ARCHIVE_BYTES_IN_MEMORY)  # noqa: SIM115 - the response closes it
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for generation_id in selected:
            try:
                row = services.outputs.get_row(generation_id, caller=g.caller)
                file.writestr(
                    f"{row.created_at:%Y-%m-%d}-{row.seed}-{str(row.id)[:8]}.{row.format}",
                    get_blobs().get(row.blob_key),
                )
            except (ResourceNotFoundError, OutputWithdrawnError):
                continue
    archive.seek(0)
    name = f"afterimage-{len(selected)}-images.zip"
    response = send_file(archive, "application/zip", as_attachment=True, download_name=name)
    response.headers["Cache-Control"] = "no-store"
    return response


@studio_gallery.post("/gallery/delete")
def delete_selected() -> Response:
    for generation_id in _selected():
        try:
            services.outputs.delete(generation_id, caller=g.caller)
        except (ResourceNotFoundError, OutputWithdrawnError):
            continue
    return redirect_to("studio_gallery.gallery")


def _selected() -> list[UUID]:
    """Return the ids of the outputs that the form selects.

    Raises:
        ValidationError: it selects none or too many, or an id is not valid.
    """
    try:
        selected = [UUID(each) for each in dict.fromkeys(request.form.getlist("selected"))]
    except ValueError:
        raise problems.field_error("form.selected", "uuid_parsing", "Must be the id of an image.") from None
    if not 1 <= len(selected) <= MAX_SELECTED:
        raise problems.field_error("form.selected", "length", f"Select 1 to {MAX_SELECTED} images first.")
    return selected


@studio_gallery.get("/gallery/<uuid:generation_id>")
def output(generation_id: UUID) -> Response:
    """Show an output with its references and its provenance."""
    view = services.outputs.get(generation_id, caller=g.caller)
    references = [
        PinnedReference.recorded(each.image_id, each.weight)
        for each in view.references
        if each.kind is ReferenceKind.CORPUS
    ]
    # The record has the output's own seed instead of the seeds of its job.
    recorded = {**view.provenance.get("parameters", {}), "seeds": [view.seed]}
    create_values = create_values_of(recorded, references)
    original = None if view.replay is None else _find(view.replay.of)
    return render_page("output", active="gallery", output=view, original=original, create_values=create_values)


def _find(generation_id: UUID) -> OutputView | None:
    """Return an output; `None` if it was deleted or withdrawn."""
    try:
        return services.outputs.get(generation_id, caller=g.caller)
    except (ResourceNotFoundError, OutputWithdrawnError):
        return None


@studio_gallery.post("/gallery/<uuid:generation_id>/replay")
def replay(generation_id: UUID) -> Response:
    submitted = services.generation.replay(generation_id, caller=g.caller, key=form_key())
    return redirect_to("studio_generation.job", job_id=submitted.view.id)


@studio_gallery.post("/gallery/<uuid:generation_id>/remember")
def remember(generation_id: UUID) -> Response:
    """Add the output to the corpus. Sending it twice does no harm, because a collection has each file once."""
    decoder = current_app.extensions["decoder"]
    remembered = services.outputs.remember(generation_id, RememberRequest(), caller=g.caller, decoder=decoder)
    return redirect_to("studio_corpus.image", image_id=remembered.image.id)


@studio_gallery.post("/gallery/<uuid:generation_id>/delete")
def delete_output(generation_id: UUID) -> Response:
    services.outputs.delete(generation_id, caller=g.caller)
    return redirect_to("studio_gallery.gallery")
