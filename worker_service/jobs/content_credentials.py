"""The signed manifests of outputs: how they were made, from which references, and that a model made them."""

import logging
from collections.abc import Mapping
from typing import Any

from shared.content_credentials import ContentSigner, created_by
from shared.settings import get_settings
from shared.singleton import process_singleton

logger = logging.getLogger(__name__)

PROMPT_FIELDS = ("prompt", "negative_prompt", "concepts", "avoid", "split_prompt")
"""Parameters that are words of the prompt, or follow from it."""
MODEL_TYPE, PROMPT_TYPE = "c2pa.types.model", "c2pa.types.generator.prompt"
"""Types of ingredients in the standard."""


@process_singleton
def get_signer() -> ContentSigner | None:
    """The signer of this process; None: the settings ask for no signatures.

    Raises:
        ConfigurationError: the library or a file is missing, or the certificate and its key cannot sign.
    """
    settings = get_settings().content_credentials
    if not settings.enabled:
        return None
    signer = ContentSigner.load(settings)
    logger.info("content_credentials_enabled", extra={"certificate": str(settings.certificate_chain)})
    return signer


def record_of_file(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an output's record that its file contains: all of it, or all but the prompt."""
    if get_settings().content_credentials.include_prompt:
        return dict(provenance)
    # The context of a warning may be the end of the prompt.
    warnings = [{**warning, "context": {}} for warning in provenance["warnings"]]
    return {**_without_prompt(provenance), "warnings": warnings}


def _without_prompt(value: Any) -> Any:
    """The value without the fields of the prompt, at any depth: a pinned reference names its concepts too."""
    if isinstance(value, Mapping):
        return {name: _without_prompt(each) for name, each in value.items() if name not in PROMPT_FIELDS}
    return [_without_prompt(each) for each in value] if isinstance(value, list) else value


def manifest_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest definition of an output. record: the one that its file contains."""
    model, parameters = record["model"], record["parameters"]
    ingredients: list[dict[str, Any]] = [
        {
            "label": "model",
            "title": f"{model['name']} ({model['pipeline']})",
            "relationship": "inputTo",
            "data_types": [{"type": MODEL_TYPE}],
            "metadata": _metadata(model, ("weights_digest", "weights_digest_kind", "source_revision")),
        },
        *(
            {
                "label": f"reference-{position}",
                "title": reference["caption"] or f"reference {position}",
                "relationship": "inputTo",
                "instance_id": f"urn:uuid:{reference['image_id']}",
                "metadata": _metadata(reference, ("kind", "sha256", "weight", "similarity")),
            }
            for position, reference in enumerate(record["references"], 1)
        ),
    ]
    if "prompt" in parameters:
        ingredients.append(
            {
                "label": "prompt",
                "title": "prompt",
                "description": parameters["prompt"],
                "relationship": "inputTo",
                "data_types": [{"type": PROMPT_TYPE}],
            }
        )
    agent = {"name": "Afterimage", "version": record["versions"]["afterimage"]}
    return {
        "claim_generator_info": [agent],
        "title": f"{record['job_id']}-{record['index']}.{parameters['format']}",
        "ingredients": ingredients,
        "assertions": [created_by(agent, ingredients=tuple(each["label"] for each in ingredients))],
    }


def _metadata(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {f"afterimage:{name}": values[name] for name in names if values.get(name) is not None}
