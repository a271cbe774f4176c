"""Studio's pages of outputs: browse, filter, mark, download, remember and delete them, and show one or compare two."""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from tempfile import SpooledTemporaryFile
from typing import Any
from uuid import UUID

from flask import Response, current_app, g, request, send_file

from api_service import services
from api_service.http import problems
from api_service.services.outputs import Remembered
from api_service.studio.generation import create_values_of, form_key
from api_service.studio.pages import (
    IMAGES_PER_PAGE,
    page_blueprint,
    read_form,
    redirect_to,
    render_page,
    selected_ids,
    show_errors_on,
    wants_fragment,
)
from api_service.studio.translations import _
from api_service.studio.words import mode_words
from shared.contracts.generation import Mode, PinnedReference
from shared.contracts.images import ImageView
from shared.contracts.jobs import OutputView, ReferenceKind
from shared.contracts.outputs import OutputPatch, OutputQuery, RememberRequest
from shared.errors import OutputWithdrawnError, ResourceNotFoundError
from shared.storage import get_blobs

studio_gallery = page_blueprint("studio_gallery")

FILTERS = (
    *("words", "model", "mode", "favourite", "reference_id", "job_id", "bulk_id"),
    *("created_after", "created_before"),
)
MAX_REMEMBERED = 48
"""Each remembered image is decoded while the browser waits."""
ARCHIVE_BYTES_IN_MEMORY = 16 * 2**20


@studio_gallery.get("/gallery")
def gallery() -> Response:
    query = read_form(OutputQuery, request.args, (*FILTERS, "cursor"), limit=IMAGES_PER_PAGE)
    page = services.outputs.list_page(query, caller=g.caller)
    return _gallery_page(query, _jobs_in_order(page.items), next_cursor=page.next_cursor)


def _gallery_page(
    query: OutputQuery, items: Sequence[OutputView], *, next_cursor: str | None = None, like_picture: bool = False
) -> Response:
    """like_picture: the items are the results of a search by a picture."""
    reference = None if query.reference_id is None else _find_image(query.reference_id)
    return render_page(
        "gallery_page" if wants_fragment() else "gallery",
        active="gallery",
        items=items,
        next_cursor=next_cursor,
        query=query,
        like_picture=like_picture,
        is_filtered=like_picture or any(request.args.get(name) for name in FILTERS),
        kept=_kept_filters(),
        reference=reference,
        models=[each.name for each in services.status.models().models],
        modes=[mode.value for mode in Mode if mode is not Mode.AUTO],
        periods=_periods(),
    )


def _find_image(image_id: UUID) -> ImageView | None:
    try:
        return services.images.get(image_id, caller=g.caller) if "search" in g.caller.scopes else None
    except ResourceNotFoundError:
        return None


def _kept_filters() -> dict[str, str]:
    """Return the filters of the address. Actions on the gallery's images come back to the same list."""
    return {name: request.args[name] for name in FILTERS if request.args.get(name)}


@studio_gallery.post("/gallery/like")
def like_picture() -> Response:
    """Show the output whose file was sent, and remembered outputs that look like it."""
    query = OutputQuery(limit=IMAGES_PER_PAGE)
    show_errors_on(lambda: _gallery_page(query, [], like_picture=True))
    file = request.files.get("image")
    picture = file.read() if file is not None else b""
    if not picture:
        raise problems.field_error("form.image", "missing", _("Choose a picture."))
    found = services.outputs.find_like(picture, caller=g.caller, decoder=current_app.extensions["decoder"])
    return _gallery_page(query, found, like_picture=True)


def _periods() -> list[tuple[str, str]]:
    """Return the names of the times since when outputs can be shown, and the times. They stay equal for a day."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = {_("yesterday"): 1, _("a week ago"): 7, _("a month ago"): 30}
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
    selected = selected_ids()
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
    _for_each(selected_ids(), lambda generation_id: services.outputs.delete(generation_id, caller=g.caller))
    return redirect_to("studio_gallery.gallery", **_kept_filters())


@studio_gallery.post("/gallery/favourite")
def mark_selected() -> Response:
    patch = OutputPatch(favourite=True)
    _for_each(selected_ids(), lambda generation_id: services.outputs.change(generation_id, patch, caller=g.caller))
    return redirect_to("studio_gallery.gallery", **_kept_filters())


@studio_gallery.post("/gallery/remember")
def remember_selected() -> Response:
    """Add the selected outputs to the corpus, as `remember`."""
    _for_each(selected_ids(MAX_REMEMBERED), _remember)
    return redirect_to("studio_corpus.corpus")


def _for_each(generation_ids: Iterable[UUID], act: Callable[[UUID], object]) -> None:
    """Call `act` for each output. One that is gone is left out."""
    for generation_id in generation_ids:
        try:
            act(generation_id)
        except (ResourceNotFoundError, OutputWithdrawnError):
            continue


@studio_gallery.get("/gallery/compare")
def compare() -> Response:
    """Show two outputs with a slider between them, and the values in which their records differ."""
    if "selected" not in request.args:
        return redirect_to("studio_gallery.gallery")
    try:
        ids = [UUID(each) for each in request.args.getlist("selected")]
    except ValueError:
        ids = []
    if len(ids) != 2:
        raise problems.field_error("query.selected", "length", _("Select exactly two images to compare."))
    first, second = (services.outputs.get(generation_id, caller=g.caller) for generation_id in ids)
    return render_page("compare", active="gallery", first=first, second=second, differences=_differences(first, second))


def _differences(first: OutputView, second: OutputView) -> list[tuple[str, Any, Any]]:
    """Return the name, and the value of each output, of everything that determined their pixels differently."""
    one, other = _drawn_with(first), _drawn_with(second)
    return [(name, one[name], other[name]) for name in one if one[name] != other[name]]


def _drawn_with(output: OutputView) -> dict[str, Any]:
    parameters, model = output.provenance.get("parameters", {}), output.provenance.get("model", {})
    mode = output.provenance.get("mode")
    return {
        _("prompt"): parameters.get("prompt"),
        _("negative prompt"): parameters.get("negative_prompt"),
        _("seed"): output.seed,
        _("model"): model.get("name"),
        _("weights"): model.get("weights_digest"),
        _("drawn"): mode_words(mode) if mode else None,
        _("references"): ", ".join(
            f"{each.caption or each.image_id} ({each.weight:.0%})" for each in output.references
        ),
        _("size"): f"{output.width} x {output.height}",
        _("steps"): parameters.get("num_inference_steps"),
        _("guidance"): parameters.get("guidance_scale"),
        _("scheduler"): parameters.get("scheduler"),
        "LoRAs": ", ".join(f"{name} {scale:g}" for name, scale in (parameters.get("loras") or {}).items()),
        _("reference strength"): parameters.get("ip_adapter_scale"),
        _("strength"): parameters.get("strength"),
    }


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
    return redirect_to("studio_corpus.image", image_id=_remember(generation_id).image.id)


def _remember(generation_id: UUID) -> Remembered:
    decoder = current_app.extensions["decoder"]
    return services.outputs.remember(generation_id, RememberRequest(), caller=g.caller, decoder=decoder)


@studio_gallery.post("/gallery/<uuid:generation_id>/favourite")
def mark(generation_id: UUID) -> Response:
    """Mark the output as a favourite or, with `favourite=false`, end that."""
    patch = read_form(OutputPatch, request.form, ("favourite",), favourite=True)
    view = services.outputs.change(generation_id, patch, caller=g.caller)
    if wants_fragment():
        return render_page("favourite", active="gallery", output=view, kept=_kept_filters())
    if request.form.get("from") == "output":
        return redirect_to("studio_gallery.output", generation_id=generation_id)
    return redirect_to("studio_gallery.gallery", **_kept_filters())


@studio_gallery.post("/gallery/<uuid:generation_id>/delete")
def delete_output(generation_id: UUID) -> Response:
    services.outputs.delete(generation_id, caller=g.caller)
    return redirect_to("studio_gallery.gallery")
