"""`afterimage generate`, and the download of a job's images."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from afterimage_client.command.output import Context, ExitCode, job_progress, with_service
from afterimage_client.errors import InvalidInputError, JobFailedError
from afterimage_client.requests import generation_request
from shared.contracts.common import ImageFormat
from shared.contracts.generation import Mode, RagGenerateRequest
from shared.contracts.jobs import JobState, JobView, Lane

Command = TypeVar("Command", bound=Callable[..., Any])
MAX_NAME_CHARS = 48
FIELDS: dict[str, dict[str, Any]] = {
    "num_images": {"metavar": "N", "help": "Number of images [default: 1]."},
    "seed": {"metavar": "N", "help": "Seed of the first image; image i gets seed + i [default: random]."},
    "width": {"metavar": "PIXELS"},
    "height": {"metavar": "PIXELS"},
    "negative_prompt": {"metavar": "TEXT", "help": "Things that the image must not show."},
    "model": {"metavar": "NAME", "help": "Model of the service [default: its default]."},
    "num_inference_steps": {"metavar": "N", "help": "Denoising steps [default: the model's]."},
    "guidance_scale": {"metavar": "NUMBER", "help": "How closely the image follows the prompt [default: the model's]."},
    "mode": {"type": click.Choice([mode.value for mode in Mode]), "help": "How references condition the image."},
    "strength": {"metavar": "SHARE", "help": "img2img: share of the noise schedule that is run."},
    "similar_examples_count": {"metavar": "N", "help": "Largest number of references to search."},
    "format": {"type": click.Choice([each.value for each in ImageFormat]), "help": "File format [default: png]."},
    "lane": {"type": click.Choice([lane.value for lane in Lane]), "help": "Priority [default: normal]."},
}
"""The fields of a request that have an option of their own. Pydantic reads their values."""


def field_options(command: Command) -> Command:
    for name, options in reversed(FIELDS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, **options)(command)
    return command


@click.command()
@click.argument("prompt")
@click.option(
    "-r", "--references", multiple=True, metavar="FILE|ID", help="Image file, or id of a corpus image; may be repeated."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder of the images, or the file of a single one [default: the current folder].",
)
@field_options
@click.option("--collection", metavar="NAME", help="Where references are searched [default: shared].")
@click.option("--set", "more", multiple=True, metavar="FIELD=VALUE", help="Any other field, as JSON or text.")
@click.option("--no-wait", is_flag=True, help="Submit the job and print its id.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest wait; the job then continues.")
@with_service
def generate(
    context: Context,
    /,
    *,
    prompt: str,
    references: tuple[str, ...],
    out: Path,
    collection: str | None,
    more: tuple[str, ...],
    no_wait: bool,
    timeout: float | None,
    **fields: str | None,
) -> int:
    """Draw images of PROMPT and save them.

    References are the given images, or those that the service finds for the prompt in its corpus.

    \b
        afterimage generate "a green heart" -r sketch.png -o out/heart.png
        afterimage generate "a red fox" --num-images 4 --seed 7 --out out/
    """
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    given |= dict(_pair(each) for each in more)
    if collection is not None:
        given["filter"] = {"collection": collection}
    if _is_file(out):
        given.setdefault("format", _format(out))
    request = generation_request(prompt, references=references, **given)
    if _is_file(out) and (request.num_images > 1 or request.format != _format(out)):
        asked = f"{request.num_images} {request.format} images are asked for"
        raise InvalidInputError(f"--out {out} is one {_format(out)} file, but {asked}: name a folder")
    job = context.service.jobs.submit(request)
    if no_wait:
        context.result(job, str(job.id))
        return ExitCode.DONE
    return wait_and_save(context, job, out, timeout_s=timeout)


def wait_and_save(context: Context, job: JobView, out: Path | None, *, timeout_s: float | None) -> int:
    """Wait for a job and download its images.

    Raises:
        JobFailedError: the job ended without success.
    """
    try:
        with job_progress(context) as show:
            job = context.service.jobs.wait(job, timeout_s=timeout_s, on_update=show)
    except KeyboardInterrupt:
        context.note(f"Job {job.id} continues: `afterimage jobs wait {job.id}`, or `afterimage jobs cancel {job.id}`.")
        raise
    if job.state is not JobState.SUCCEEDED:
        raise JobFailedError(job)
    files = [] if out is None else save_outputs(context, job, out)
    for warning in job.warnings:
        context.note(f"{warning.code}: {warning.detail}")
    context.result({"job": job.model_dump(mode="json"), "files": [str(file) for file in files]}, *map(str, files))
    return ExitCode.DONE


def save_outputs(context: Context, job: JobView, out: Path) -> list[Path]:
    """Download the images of a job into a folder, or into one file."""
    targets = [out] if _is_file(out) else [out / file_name(job, index) for index in range(len(job.outputs))]
    if len(targets) != len(job.outputs):
        raise InvalidInputError(f"--out {out} is one file, but the job has {len(job.outputs)} images: name a folder")
    for output, target in zip(job.outputs, targets, strict=True):
        context.service.outputs.download(output, target)
    return targets


def file_name(job: JobView, index: int) -> str:
    """Return a name with the first words of the prompt, the seed, and the start of the output's id."""
    output = job.outputs[index]
    words = "-".join(re.findall(r"\w+", job.prompt.lower()))[:MAX_NAME_CHARS].strip("-_") or "image"
    return f"{words}-{output.seed}-{str(output.id)[:8]}.{'jpg' if output.format == 'jpeg' else output.format}"


def _is_file(out: Path) -> bool:
    return not out.is_dir() and _format(out) in list(ImageFormat)


def _format(file: Path) -> str:
    suffix = file.suffix[1:].lower()
    return "jpeg" if suffix == "jpg" else suffix


def _pair(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or name not in RagGenerateRequest.model_fields:
        raise InvalidInputError(f"--set {text}: write FIELD=VALUE with a field of POST /rag/generate")
    return name, parse_value(value)


def parse_value(text: str) -> Any:
    """Parse JSON; return other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
