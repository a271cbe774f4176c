"""Words for values that the API names by codes: modes, states, fields of forms."""

from api_service.studio.translations import _, mark

MODES = {
    "auto": mark("as the service chooses"),
    "image_prompt": mark("by the look of the references"),
    "img2img": mark("starting from the first reference"),
    "image_prompt+img2img": mark("by their look, starting from the first"),
    "caption": mark("by the captions of the references"),
    "reference": mark("with the references in view"),
    "none": mark("from the words alone"),
}

WORDS = {
    # jobs, their events and their lanes
    "queued": mark("queued"),
    "processing": mark("drawing"),
    "succeeded": mark("succeeded"),
    "failed": mark("failed"),
    "canceled": mark("canceled"),
    "expired": mark("expired"),
    "dead": mark("dead"),
    "deleted": mark("deleted"),
    "started": mark("started"),
    "resolved": mark("resolved"),
    "degraded": mark("degraded"),
    "moderated": mark("moderated"),
    "requeued": mark("requeued"),
    "high": mark("high"),
    "normal": mark("normal"),
    "low": mark("low"),
    "bulk": mark("bulk"),
    # stages of a job
    "wait": mark("wait"),
    "moderate": mark("moderate"),
    "embed": mark("embed"),
    "retrieve": mark("retrieve"),
    "load_references": mark("load references"),
    "generate": mark("generate"),
    "store": mark("store"),
    # bulks
    "receiving": mark("receiving"),
    "running": mark("running"),
    "paused": mark("paused"),
    "completed": mark("completed"),
    "refused": mark("refused"),
    "abandoned": mark("abandoned"),
    # images and collections
    "pending": mark("pending"),
    "ready": mark("ready"),
    "read": mark("read"),
    "write": mark("write"),
    "owner": mark("owner"),
    # searches
    "hybrid": mark("pictures and words"),
    "vector": mark("pictures"),
    "text": mark("captions and tags"),
    # replays and the content policy
    "identical": mark("identical"),
    "within_tolerance": mark("within tolerance"),
    "different": mark("different"),
    "prompt": mark("prompt"),
    "output": mark("output"),
    "flag": mark("flag"),
    "blur": mark("blur"),
    "block": mark("block"),
    # workers
    "loading": mark("loading"),
    "draining": mark("draining"),
    "io": mark("io"),
}

LABELS = {
    "access": mark("Access"),
    "add_tags": mark("Add tags"),
    "avoid": mark("Avoid"),
    "caption": mark("Caption"),
    "cascade": mark("Also withdraw"),
    "collection": mark("Collection"),
    "concepts": mark("Concepts"),
    "created_after": mark("Since"),
    "description": mark("Description"),
    "favourite": mark("Favourite"),
    "file": mark("Files"),
    "filter": mark("Filter"),
    "find": mark("Words"),
    "format": mark("Format"),
    "guidance_scale": mark("Guidance"),
    "height": mark("Height"),
    "image": mark("Picture"),
    "ip_adapter_scale": mark("Reference strength"),
    "k": mark("References"),
    "licence": mark("Licence"),
    "min_similarity": mark("Lowest similarity"),
    "mode": mark("Mode"),
    "model": mark("Model"),
    "name": mark("Name"),
    "negative": mark("But not"),
    "negative_prompt": mark("Negative prompt"),
    "num_images": mark("Images"),
    "num_inference_steps": mark("Steps"),
    "on_invalid": mark("If a line is wrong"),
    "owner": mark("Owner"),
    "prompt": mark("Prompt"),
    "prompts": mark("Prompts"),
    "quality": mark("Quality"),
    "query": mark("Search"),
    "reason": mark("Reason"),
    "reference_image": mark("Pictures"),
    "remove_tags": mark("Remove tags"),
    "scheduler": mark("Scheduler"),
    "seed": mark("Seed"),
    "selected": mark("Selection"),
    "similar_examples_count": mark("Number of references"),
    "source": mark("Source"),
    "state": mark("State"),
    "strength": mark("Strength (img2img)"),
    "table": mark("CSV file"),
    "tag": mark("Tag"),
    "tags": mark("Tags"),
    "width": mark("Width"),
    "words": mark("Words of the prompt"),
}


def mode_words(mode: str) -> str:
    """Return how the picture is drawn."""
    return _(MODES[mode]) if mode in MODES else mode


def word(code: str) -> str:
    """Return the word for a state, an event, an access or another value of an enum."""
    return _(WORDS[code]) if code in WORDS else code.replace("_", " ")


def field_label(name: str) -> str:
    """Return the label of a form's field."""
    return _(LABELS[name]) if name in LABELS else name.replace("_", " ")


def plain_message(name: str, code: str) -> str | None:
    """Return the message for a person about an error of a field; `None`: the API's own message is plain."""
    if name == "prompt" and code in ("missing", "string_too_short"):
        return _("Say in words what the picture should show.")
    if code == "missing":
        return {"name": _("Give it a name."), "owner": _("Name the owner.")}.get(name)
    return None
