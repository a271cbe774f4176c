"""One retrieval-augmented generation from start to end, with everything it drew from, written to `out/`.

    python -m scripts.demo "a red apple with a bite" --url http://127.0.0.1:8000

Writes image.png, references.png (the memories that shaped it, with similarity and weight) and provenance.json.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from scripts.index_images import index

STARTER_CORPUS = Path(__file__).resolve().parent.parent / "starter" / "corpus.tar"
ENLARGE = 4
CELL, CAPTION_HEIGHT = 160, 44


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red apple with a bite")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the API listens (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--corpus", type=Path, default=STARTER_CORPUS)
    arguments = parser.parse_args()
    console = Console()
    with httpx.Client(base_url=f"{arguments.url}/api/v1", timeout=60) as api:
        index(api, arguments.corpus, collection="shared", console=console)
        job = generate(
            api, {"prompt": arguments.prompt, "num_images": arguments.num_images, "seed": arguments.seed}, console
        )
        if job["state"] != "succeeded":
            raise SystemExit(f"the job ended {job['state']}: {job['error']}")
        tell(job, console)
        for path in write(api, job, arguments.out):
            console.print(f"wrote [bold]{path}")


def generate(api: httpx.Client, request: dict[str, Any], console: Console) -> dict[str, Any]:
    """Submit and follow the job to its end."""
    accepted = api.post("/rag/generate", json=request).raise_for_status()
    url = accepted.headers["Location"].removeprefix("/api/v1")
    with Progress(TextColumn("[bold]{task.description}"), BarColumn(), console=console) as progress:
        task = progress.add_task("queued", total=None)
        while True:
            job: dict[str, Any] = api.get(url).raise_for_status().json()
            step = job["progress"] or {"step": 0, "total_steps": None}
            progress.update(task, description=job["state"], completed=step["step"], total=step["total_steps"])
            if job["finished_at"] is not None:
                progress.update(task, completed=1, total=1)
                return job
            time.sleep(0.1)


def tell(job: dict[str, Any], console: Console) -> None:
    """Which memories were looked at, which were used, and why."""
    resolution = job["resolution"]
    table = Table(title=f"“{job['prompt']}” · {resolution['mode']}: {resolution['reason']}")
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
    console.print("seconds per stage:", {stage: round(seconds, 2) for stage, seconds in job["timings"].items()})


def write(api: httpx.Client, job: dict[str, Any], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    outputs = [fetch_image(api, output["content_url"]) for output in job["outputs"]]
    paths = [out / "image.png", out / "references.png", out / "provenance.json"]
    side_by_side(outputs).save(paths[0])
    references_sheet(api, job).save(paths[1])
    record = {"job": {key: value for key, value in job.items() if key != "outputs"}, "outputs": job["outputs"]}
    paths[2].write_text(json.dumps(record, indent=2))
    return paths


def fetch_image(api: httpx.Client, url: str) -> Image.Image:
    data = api.get(url.removeprefix("/api/v1")).raise_for_status().content
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


def references_sheet(api: httpx.Client, job: dict[str, Any]) -> Image.Image:
    """The references of the job with caption, similarity and weight."""
    references = job["resolution"]["references"]
    sheet = Image.new("RGB", (CELL * max(1, len(references)), CELL + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for column, reference in enumerate(references):
        image = fetch_image(api, f"/images/{reference['image_id']}/content")
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
