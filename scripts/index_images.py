"""Index a WebDataset tar of images: NAME.webp (or .png, .jpg) beside NAME.json with caption, tags, licence, source and
attributes.

    python -m scripts.index_images starter/corpus.tar --url http://127.0.0.1:8000

Images that the collection already has are skipped, so an interrupted run is simply started again.
"""

import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scripts.waiting import wait_until

IMAGE_SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
PARALLEL_UPLOADS = 4


@dataclass(frozen=True)
class Sample:
    filename: str
    data: bytes
    fields: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="the tar file")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the API listens (default: %(default)s)")
    parser.add_argument("--collection", default="shared", help="collection to index into (default: %(default)s)")
    arguments = parser.parse_args()
    with httpx.Client(base_url=f"{arguments.url}/api/v1", timeout=60) as api:
        index(api, arguments.corpus, collection=arguments.collection, console=Console())


def index(api: httpx.Client, corpus: Path, *, collection: str, console: Console) -> None:
    """Upload what the collection lacks, then wait until all of it is searchable.

    Raises:
        httpx.HTTPStatusError: the API refused an image.
    """
    known = set(indexed_digests(api, collection))
    samples = [sample for sample in read_samples(corpus) if sample.sha256 not in known]
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if samples:
        with (
            Progress(*columns, console=console) as progress,
            ThreadPoolExecutor(PARALLEL_UPLOADS) as uploads,
        ):
            task = progress.add_task("indexing", total=len(samples))
            for _ in uploads.map(lambda sample: upload(api, sample, collection), samples):
                progress.advance(task)
    wait_until(
        lambda: not pending(api, collection),
        timeout_s=300,
        what="every image to be searchable (is an embed worker up?)",
    )


def read_samples(corpus: Path) -> Iterator[Sample]:
    """The images of a WebDataset tar with what its JSON files say of them."""
    with tarfile.open(corpus) as tar:
        described: dict[str, dict[str, Any]] = {}
        images: dict[str, tuple[str, bytes]] = {}
        for member in tar:
            path = PurePosixPath(member.name)
            file = tar.extractfile(member)
            if file is None:
                continue
            if path.suffix == ".json":
                described[path.stem] = json.load(file)
            elif path.suffix in IMAGE_SUFFIXES:
                images[path.stem] = (path.name, file.read())
            if path.stem in described and path.stem in images:
                filename, data = images.pop(path.stem)
                yield Sample(filename, data, described.pop(path.stem))


def indexed_digests(api: httpx.Client, collection: str) -> Iterator[str]:
    query = {"collection": collection, "limit": "100"}
    while True:
        page = api.get("/images", params=query).raise_for_status().json()
        yield from (image["sha256"] for image in page["items"])
        if page["next_cursor"] is None:
            return
        query["cursor"] = page["next_cursor"]


def upload(api: httpx.Client, sample: Sample, collection: str) -> None:
    fields = sample.fields
    form = {
        "caption": fields.get("caption", ""),
        "tags": fields.get("tags", []),
        "licence": fields.get("licence", ""),
        "source": fields.get("source", ""),
        "attributes": json.dumps({name: str(value) for name, value in fields.get("attributes", {}).items()}),
        "collection": collection,
    }
    given = {name: value for name, value in form.items() if value not in ("", [])}
    api.post("/upload", data=given, files={"file": (sample.filename, sample.data)}).raise_for_status()


def pending(api: httpx.Client, collection: str) -> bool:
    page = api.get("/images", params={"collection": collection, "state": "pending", "limit": 1})
    return bool(page.raise_for_status().json()["items"])


if __name__ == "__main__":
    main()
