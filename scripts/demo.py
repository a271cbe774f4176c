"""One retrieval-augmented generation from start to end, with everything it drew from, written to `out/`.

    python -m scripts.demo "a red apple with a bite" --url http://127.0.0.1:8000

Writes image.png, references.png (the memories that shaped it, with similarity and weight) and provenance.json.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any
from uuid import UUID

from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from afterimage_client import Afterimage, AfterimageError, JobState, JobView, RagGenerateRequest, Update
from scripts.console import Output
from scripts.index_images.__main__ import index, wait_until_searchable
from scripts.index_images.sources import found_in
from scripts.index_images.upload import Report, Uploader

STARTER_CORPUS = Path(__file__).resolve().parent.parent / "starter" / "corpus.tar"
EMBEDDING_WAIT_S = 300
ENLARGE = 4
CELL, CAPTION_HEIGHT = 160, 44


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red apple with a bite")
    parser.add_argument("--url", help="where the API listens (default: $AFTERIMAGE_URL, else http://127.0.0.1:8000)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--corpus", type=Path, default=STARTER_CORPUS)
    arguments = parser.parse_args()
    console = Console()
    with Afterimage(arguments.url) as service:
        try:
            remember(service, arguments.corpus, console)
            request = RagGenerateRequest(prompt=arguments.prompt, num_images=arguments.num_images, seed=arguments.seed)
            job = generate(service, request, console)
            if job.state is not JobState.SUCCEEDED:
                raise SystemExit(f"the job ended {job.state}: {job.error}")
            tell(job, console)
            for path in write(service, job, arguments.out):
                console.print(f"wrote [bold]{path}")
        except AfterimageError as error:
            raise SystemExit(f"error: {error}") from error


def remember(service: Afterimage, corpus: Path, console: Console) -> None:
    """Index what the shared collection lacks, and wait until all of it is searchable."""
    console.print(f"indexing what is new of {corpus.name} ...")
    index(Uploader(service, "shared", Report(None)), found_in(corpus), Output(console=console))
    if not wait_until_searchable(service, "shared", timeout_s=EMBEDDING_WAIT_S):
        raise SystemExit(f"the corpus is not searchable after {EMBEDDING_WAIT_S} s: is an embed worker up?")


def generate(service: Afterimage, request: RagGenerateRequest, console: Console) -> JobView:
    """Submit and follow the job to its end."""
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


def tell(job: JobView, console: Console) -> None:
    """Which memories were looked at, which were used, and why."""
    resolution = job.resolution or {}
    table = Table(title=f"“{job.prompt}” · {resolution['mode']}: {resolution['reason']}")
    for column in ("memory", "similarity", "weight", "decision"):
        table.add_column(column)
    for reference in resolution["references"]:
        table.add_row(
            reference["caption"] or reference["image_id"],
            f"{reference['similarity']:.3f}",
            f"{reference['weight']:.2f}",
            reference["reason"],
        )
    console.print(table)
    console.print("seconds per stage:", {stage: round(seconds, 2) for stage, seconds in job.timings.items()})


def write(service: Afterimage, job: JobView, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "image.png", out / "references.png", out / "provenance.json"]
    side_by_side([opened(service.outputs.content(output)) for output in job.outputs]).save(paths[0])
    references_sheet(service, (job.resolution or {}).get("references", [])).save(paths[1])
    record = {
        "job": job.model_dump(mode="json", exclude={"outputs"}),
        "outputs": job.model_dump(mode="json")["outputs"],
    }
    paths[2].write_text(json.dumps(record, indent=2))
    return paths


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """The outputs in a row, enlarged so that a person sees them."""
    width, height = images[0].size
    scale = max(1, ENLARGE * 64 // max(width, height))
    sheet = Image.new("RGB", (len(images) * width * scale, height * scale), "white")
    for column, image in enumerate(images):
        sheet.paste(
            image.resize((width * scale, height * scale), Image.Resampling.LANCZOS), (column * width * scale, 0)
        )
    return sheet


def references_sheet(service: Afterimage, references: list[dict[str, Any]]) -> Image.Image:
    """The references of the job with caption, similarity and weight."""
    sheet = Image.new("RGB", (CELL * max(1, len(references)), CELL + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for column, reference in enumerate(references):
        image = opened(service.images.content(UUID(reference["image_id"])))
        image.thumbnail((CELL - 16, CELL - 16))
        sheet.paste(image, (column * CELL + 8, 8))
        used = f"weight {reference['weight']:.2f}" if reference["used"] else "not used"
        caption = (reference["caption"] or "")[:24]
        draw.text((column * CELL + 8, CELL), f"{caption}\n{reference['similarity']:.3f}  {used}", fill="black")
    if not references:
        draw.text((8, 8), "no references", fill="black")
    return sheet


if __name__ == "__main__":
    main()
