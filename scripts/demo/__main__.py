"""Run one retrieval-augmented generation and write its images, references and provenance to `out/`.

    python -m scripts.demo "a red apple with a bite" --url http://127.0.0.1:8000
    python -m scripts.demo --sheet --quiz

The first writes image.png, references.png (the references of each concept, with similarity and weight) and
provenance.json. With `--sheet` it draws one image for each prompt of a file into sheet.png.
"""

import argparse
import json
from pathlib import Path
from uuid import UUID

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from afterimage_client import Afterimage, AfterimageError, JobState, JobView, RagGenerateRequest, Update
from scripts.console import ConsoleOutput
from scripts.contact_sheet import Cell, decode_image, sheet_of_rows
from scripts.demo import sheet
from scripts.index_images.index import index_files, wait_until_searchable
from scripts.index_images.report import Report
from scripts.index_images.sources import read_source
from scripts.index_images.upload import Uploader
from shared.contracts.records import ConsideredReference, Resolution

STARTER_CORPUS = Path(__file__).resolve().parents[2] / "starter" / "corpus.tar.gz"
EMBEDDING_WAIT_S = 300
ENLARGED_PX = 256
"""Smaller images are enlarged by a whole factor to at most this side."""
CELL_PX = 240
"""Pixels per side of a reference."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default="a red apple with a bite")
    parser.add_argument("--url", help="address of the API (default: $AFTERIMAGE_URL, else http://127.0.0.1:8000)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--corpus", type=Path, default=STARTER_CORPUS)
    parser.add_argument(
        "--sheet",
        nargs="?",
        type=Path,
        const=sheet.ORDINARY_PROMPTS,
        metavar="FILE",
        help="draw one image for each prompt of FILE, one per line, instead of `prompt` (default: %(const)s)",
    )
    parser.add_argument(
        "--quiz", action="store_true", help="with --sheet: also a sheet without captions, to guess the prompts"
    )
    arguments = parser.parse_args()
    if arguments.quiz and arguments.sheet is None:
        parser.error("--quiz needs --sheet")
    console = Console()
    try:
        prompts = None if arguments.sheet is None else sheet.read_prompts(arguments.sheet)
        with Afterimage(arguments.url) as service:
            index_corpus(service, arguments.corpus, console)
            if prompts is None:
                request = RagGenerateRequest(
                    prompt=arguments.prompt, num_images=arguments.num_images, seed=arguments.seed
                )
                jobs = [generate(service, request, console)]
                print_references(jobs[0], console)
                paths = write_files(service, jobs[0], arguments.out)
            else:
                drawn = sheet.draw(service, prompts, seed=arguments.seed, console=console)
                jobs = [each.job for each in drawn]
                print_missing(jobs, console)
                paths = sheet.write_sheet(drawn, arguments.out, seed=arguments.seed)
                paths += sheet.write_quiz(drawn, arguments.out, seed=arguments.seed) if arguments.quiz else []
    except (AfterimageError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for path in paths:
        console.print(f"wrote [bold]{path}")
    if any(job.state is not JobState.SUCCEEDED for job in jobs):
        raise SystemExit(1)


def index_corpus(service: Afterimage, corpus: Path, console: Console) -> None:
    """Index the images that the shared collection lacks, and wait until all of it is searchable."""
    console.print(f"indexing new images of {corpus.name} ...")
    index_files(Uploader(service, "shared", Report(None)), read_source(corpus), ConsoleOutput(console=console))
    if not wait_until_searchable(service, "shared", timeout_s=EMBEDDING_WAIT_S):
        raise SystemExit(f"the corpus is not searchable after {EMBEDDING_WAIT_S} s: does an embed worker run?")


def generate(service: Afterimage, request: RagGenerateRequest, console: Console) -> JobView:
    """Submit a job, show its progress, and return it when it has succeeded."""
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

        job = service.jobs.wait(service.jobs.submit(request), on_update=show)
    if job.state is not JobState.SUCCEEDED:
        raise SystemExit(f"the job ended {job.state}: {job.error}")
    return job


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
    print_missing([job], console)
    console.print("seconds per stage:", {stage: round(seconds, 2) for stage, seconds in job.timings.items()})


def print_missing(jobs: list[JobView], console: Console) -> None:
    """Print the concepts for which a search found nothing, and why; and the jobs that failed."""
    for job in jobs:
        if job.state is not JobState.SUCCEEDED:
            console.print(f"“{job.prompt}”: the job ended {job.state}: {job.error}")
        for concept in (job.resolution or {"concepts": []})["concepts"]:
            if not concept["found"]:
                of_prompt = "" if concept["text"] == job.prompt else f" of “{job.prompt}”"
                console.print(f"nothing was found for “{concept['text']}”{of_prompt}: {concept['reason']}")


def by_concept(resolution: Resolution) -> dict[str, list[ConsideredReference]]:
    """The references of a job under the first concept that each is for, for every concept of the prompt."""
    groups: dict[str, list[ConsideredReference]] = {concept["text"]: [] for concept in resolution["concepts"]}
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


def references_sheet(service: Afterimage, resolution: Resolution) -> Image.Image:
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
