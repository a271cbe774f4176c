"""Run one retrieval-augmented generation and write its images, references and provenance to `out/`.

    python -m scripts.demo "a red apple with a bite" --url http://127.0.0.1:8000

Writes image.png, references.png (the references of each concept, with similarity and weight) and provenance.json.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any
from uuid import UUID

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from afterimage_client import Afterimage, AfterimageError, JobState, JobView, RagGenerateRequest, Update
from scripts.console import ConsoleOutput
from scripts.contact_sheet import Cell, sheet_of_rows
from scripts.index_images.index import index_files, wait_until_searchable
from scripts.index_images.report import Report
from scripts.index_images.sources import read_source
from scripts.index_images.upload import Uploader

STARTER_CORPUS = Path(__file__).resolve().parent.parent / "starter" / "corpus.tar"
EMBEDDING_WAIT_S = 300
ENLARGED_PX = 256
"""Smaller images are enlarged by a whole factor to at most this side."""
CELL_PX = 240
"""Pixels per side of a reference."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red apple with a bite")
    parser.add_argument("--url", help="address of the API (default: $AFTERIMAGE_URL, else http://127.0.0.1:8000)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--corpus", type=Path, default=STARTER_CORPUS)
    arguments = parser.parse_args()
    console = Console()
    try:
        with Afterimage(arguments.url) as service:
            index_corpus(service, arguments.corpus, console)
            request = RagGenerateRequest(prompt=arguments.prompt, num_images=arguments.num_images, seed=arguments.seed)
            job = generate(service, request, console)
            if job.state is not JobState.SUCCEEDED:
                raise SystemExit(f"the job ended {job.state}: {job.error}")
            print_references(job, console)
            for path in write_files(service, job, arguments.out):
                console.print(f"wrote [bold]{path}")
    except (AfterimageError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def index_corpus(service: Afterimage, corpus: Path, console: Console) -> None:
    """Index the images that the shared collection lacks, and wait until all of it is searchable."""
    console.print(f"indexing new images of {corpus.name} ...")
    index_files(Uploader(service, "shared", Report(None)), read_source(corpus), ConsoleOutput(console=console))
    if not wait_until_searchable(service, "shared", timeout_s=EMBEDDING_WAIT_S):
        raise SystemExit(f"the corpus is not searchable after {EMBEDDING_WAIT_S} s: does an embed worker run?")


def generate(service: Afterimage, request: RagGenerateRequest, console: Console) -> JobView:
    """Submit a job, show its progress, and return it when it has ended."""
    with Progress(TextColumn("[bold]{task.description}"), BarColumn(), console=console) as progress:
        task = progress.add_task("queued", total=None)

        def show(update: Update) -> None:
            step = update.progress
            progress.update(
                task,
                description=update.state.value,
                completed=1 if update.state.is_final else step.step if step else 0,
                total=1 if update.state.is_final else step.total_steps if step else None,
            )

        return service.jobs.wait(service.jobs.submit(request), on_update=show)


def print_references(job: JobView, console: Console) -> None:
    """Print the candidate references by concept, whether each was used, and why."""
    resolution = job.resolution or {}
    table = Table(title=f"“{job.prompt}” · {resolution['mode']}: {resolution['reason']}")
    for column in ("concept", "reference", "similarity", "weight", "decision"):
        table.add_column(column)
    for text, references in by_concept(resolution).items():
        for position, reference in enumerate(references):
            table.add_row(
                "" if position else text,
                reference["caption"] or reference["image_id"],
                f"{reference['similarity']:.3f}",
                f"{reference['weight']:.2f}",
                reference["reason"],
            )
        table.add_section()
    console.print(table)
    for concept in resolution["concepts"]:
        if not concept["found"]:
            console.print(f"nothing was found for “{concept['text']}”: {concept['reason']}")
    console.print("seconds per stage:", {stage: round(seconds, 2) for stage, seconds in job.timings.items()})


def by_concept(resolution: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The references of a job under the first concept that each is for, for every concept of the prompt."""
    groups: dict[str, list[dict[str, Any]]] = {concept["text"]: [] for concept in resolution["concepts"]}
    for reference in resolution["references"]:
        groups[reference["concepts"][0]].append(reference)
    return groups


def write_files(service: Afterimage, job: JobView, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "image.png", out / "references.png", out / "provenance.json"]
    side_by_side([decode_image(service.outputs.content(output)) for output in job.outputs]).save(paths[0])
    references_sheet(service, job.resolution or {"concepts": []}).save(paths[1])
    record = {
        "job": job.model_dump(mode="json", exclude={"outputs"}),
        "outputs": job.model_dump(mode="json")["outputs"],
    }
    paths[2].write_text(json.dumps(record, indent=2))
    return paths


def decode_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Place the outputs in a row; small ones are enlarged."""
    width, height = images[0].size
    scale = max(1, ENLARGED_PX // max(width, height))
    sheet = Image.new("RGB", (len(images) * width * scale, height * scale), "white")
    for column, image in enumerate(images):
        sheet.paste(
            image.resize((width * scale, height * scale), Image.Resampling.LANCZOS), (column * width * scale, 0)
        )
    return sheet


def references_sheet(service: Afterimage, resolution: dict[str, Any]) -> Image.Image:
    """Draw a row per concept: its references with caption, similarity and weight."""
    rows: list[tuple[str, list[Cell]]] = []
    for concept in resolution["concepts"]:
        cells: list[Cell] = []
        for reference in by_concept(resolution)[concept["text"]]:
            image = decode_image(service.images.content(UUID(reference["image_id"])))
            used = f"weight {reference['weight']:.2f}" if reference["used"] else "not used"
            cells.append((image, f"{reference['caption'] or ''}  {reference['similarity']:.3f}  {used}"))
        rows.append((concept["text"] if concept["found"] else f"{concept['text']}\nnothing found", cells))
    columns = max((len(cells) for _, cells in rows), default=1)
    return sheet_of_rows([""] * max(1, columns), rows, cell_px=CELL_PX)


if __name__ == "__main__":
    main()
