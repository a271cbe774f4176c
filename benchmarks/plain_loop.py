"""The baseline for indexing: the same work on the same files, in one process and one Python thread.

    .venv/bin/python -m benchmarks.plain_loop FOLDER
    .venv/bin/python -m benchmarks.plain_loop FOLDER --model

It decodes, embeds, stores and inserts each file. With `--model` it only opens, preprocesses and embeds. It uses the
database, blob store and CLIP that the settings name. The CLIP must be that of the active embedding space. Prints files,
images, seconds and processor seconds as JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from shared.contracts.common import ImageFormat
from shared.db import collections, images, owners, spaces
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import InvalidImageError
from shared.imaging import DecodedImage, decode_upload, open_image
from shared.settings import get_settings
from shared.storage import get_blobs, image_key, thumbnail_key
from worker_service.models.clip import Clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="store_true", help="run only the model")
    arguments = parser.parse_args()
    files = [path for path in sorted(arguments.folder.rglob("*")) if path.is_file()]
    settings = get_settings()
    clip = Clip.load(settings.model)
    clip.warm_up()
    if arguments.model:
        started, spent = time.perf_counter(), time.process_time()
        count = run_model(files, clip)
    else:
        with session_scope() as session:
            collection_id = collections.ensure(session, "loop", owner_id=owners.ensure(session, "loop")).id
            space = spaces.find_or_add_first(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
            if space is None or not spaces.is_active(session, space):
                parser.exit(2, "The database has another active embedding space: use an empty database, or its CLIP.\n")
        started, spent = time.perf_counter(), time.process_time()
        count = index_files(files, clip, space, collection_id)
    seconds = time.perf_counter() - started
    spent = time.process_time() - spent
    print(json.dumps({"files": len(files), "images": count, "seconds": seconds, "processor_seconds": spent}))


def run_model(files: list[Path], clip: Clip) -> int:
    for batch in batches(files, clip.max_batch_size):
        clip.encode_image([open_image(path.read_bytes()) for path in batch])
    return len(files)


def index_files(files: list[Path], clip: Clip, space: Space, collection_id: UUID) -> int:
    """Do the work of the service without a service, with one transaction per batch."""
    count = 0
    for batch in batches(files, clip.max_batch_size):
        decoded = [image for path in batch if (image := decode_or_none(path)) is not None]
        if decoded:
            vectors = clip.encode_image([open_image(image.data) for image in decoded])
            count += store_batch(decoded, vectors, space, collection_id)
    return count


def decode_or_none(path: Path) -> DecodedImage | None:
    limits = get_settings().api
    try:
        return decode_upload(path.read_bytes(), max_bytes=limits.max_upload_bytes, max_pixels=limits.max_upload_pixels)
    except InvalidImageError:
        return None


def store_batch(decoded: list[DecodedImage], vectors: np.ndarray, space: Space, collection_id: UUID) -> int:
    blobs = get_blobs()
    for image in decoded:
        blobs.put(image_key(image.sha256, image.format, image.data), image.data, media_type=image.format.media_type)
        blobs.put(thumbnail_key(image.sha256, image.thumbnail), image.thumbnail, media_type=ImageFormat.WEBP.media_type)
    norms = np.linalg.norm(vectors, axis=1)
    with session_scope() as session:
        added = [images.add(session, collection_id, **image_columns(image)) for image in decoded]
        new = [index for index, (_, is_new) in enumerate(added) if is_new]
        claims = [ImageClaim.of(added[index][0]) for index in new]
        return len(images.store_embeddings(session, space, claims, (vectors / norms[:, None])[new], norms[new]))


def image_columns(image: DecodedImage) -> dict[str, Any]:
    return {
        "sha256": image.sha256,
        "blob_key": image_key(image.sha256, image.format, image.data),
        "thumbnail_key": thumbnail_key(image.sha256, image.thumbnail),
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "size_bytes": len(image.data),
        "perceptual_hash": image.perceptual_hash,
    }


def batches(files: list[Path], size: int) -> Iterator[list[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


if __name__ == "__main__":
    main()
