"""Encodes equal prompts of a batch once. The images of one job have the same prompt, and their encoder may be large."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline


def encode_once(pipeline: DiffusionPipeline) -> None:
    """Let this pipeline object encode each different row of prompts once, in calls that encode several.

    It replaces `encode_prompt` of the object, so call it on a copy that serves one call. A pipeline that has another
    method, or that encodes prompts together with images, is left as it is.
    """
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        return
    signature = inspect.signature(encode)

    def encode_prompt(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        given = bound.arguments
        prompt = given.get("prompt")
        images = [name for name in given if "image" in name and name != "num_images_per_prompt"]
        if not isinstance(prompt, list) or any(given[name] is not None for name in images):
            return encode(*arguments, **options)
        # Other lists of texts, such as the instruction of Sana, count for all rows.
        texts = {
            name: value
            for name, value in given.items()
            if "prompt" in name and isinstance(value, list) and len(value) == len(prompt)
        }
        rows = list(zip(*texts.values(), strict=True))
        different = list(dict.fromkeys(rows))
        if len(different) == len(rows):
            return encode(*arguments, **options)
        given.update({name: list(column) for name, column in zip(texts, zip(*different, strict=True), strict=True)})
        encoded = encode(*bound.args, **bound.kwargs)
        return _repeated(encoded, [different.index(row) for row in rows], count=len(different))

    pipeline.encode_prompt = encode_prompt


def _repeated(encoded: Any, places: Sequence[int], *, count: int) -> Any:
    """Tensors and lists with `count` rows, with the row of each place; anything else as it is.

    Positions of tokens, which have no rows, are much longer than a batch.
    """
    if isinstance(encoded, tuple):
        return tuple(_repeated(each, places, count=count) for each in encoded)
    if isinstance(encoded, list) and len(encoded) == count:
        return [encoded[place] for place in places]
    if isinstance(encoded, torch.Tensor) and encoded.shape[:1] == (count,):
        return encoded[list(places)]
    return encoded
