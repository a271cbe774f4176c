"""Index images with their descriptions into a collection; `--help` shows examples."""

import argparse
from pathlib import Path

from afterimage_client import AfterimageError, ImageDescription
from scripts.console import (
    EXIT_CODES_HELP,
    ConsoleOutput,
    ExitCode,
    add_output_options,
    add_service_options,
    client_from_options,
    run_and_exit,
    shared_collection_name,
)
from scripts.index_images.index import index_files, wait_and_print_summary
from scripts.index_images.report import Report
from scripts.index_images.sources import DESCRIPTION_FIELDS, IMAGE_SUFFIXES, SourceError, read_source
from scripts.index_images.upload import Uploader
from scripts.index_images.watch import watch_folder
from scripts.table_files import FORMATS, TableFileError

DESCRIPTION = f"""\
Index images with their descriptions into a collection, and wait until they are searchable.

SOURCE is one of
  a folder     read with its subfolders; NAME.jpg is described by NAME.json (caption, tags, licence, source and
               attributes) or by NAME.txt (the caption)
  a table      CSV, TSV, JSONL or Parquet with a column `file`, relative to the table, and columns of the same names;
               TXT with one file per line
  a tar        a WebDataset, with members as in a folder; also .tar.gz, .tar.bz2 and .tar.xz
Files with one of these suffixes are read, also in capitals: {", ".join(IMAGE_SUFFIXES)}.
Other files are listed as skipped. So are images that cannot be read or described; with --strict they make the exit
code 1. An image that cannot be embedded always does. If a tar or a table is damaged in the middle, the exit code is 2,
and the images before that place stay. The service decodes a file by its content. A sidecar describes every image that
has its name, and its place in a tar does not matter. Hidden files are left out.

Images that the collection already has are not sent again: to resume an interrupted run, start it again.

--update and --watch apply what changed in a description since it was last read, also by another machine: tags and
attributes that were added or removed there, and a changed caption, licence or source. Values that a person has set or
removed in the collection stay, and win if the file has changed the same value."""

EXAMPLES = f"""\
examples:
  a folder, with source, licence and a tag for all of its images
    python -m scripts.index_images photos/ --source archive-2024 --licence CC-BY-4.0 --tag photo

  record the result of each file, and read only changed files the next time
    python -m scripts.index_images photos/ --report photos.report.jsonl

  a table whose columns have other names, into a collection of your own
    python -m scripts.index_images products.csv --column file=image_path --column caption=title --collection products

  a WebDataset
    python -m scripts.index_images starter/corpus.tar.gz

  synchronise the collection with a folder until Ctrl-C, deletions included; with the report, the next start also
  deletes images whose files were deleted in between
    python -m scripts.index_images photos/ --collection photos --watch --delete --report photos.report.jsonl

{EXIT_CODES_HELP}"""


def main() -> None:
    arguments = _parser().parse_args()
    output = ConsoleOutput(quiet=arguments.quiet, as_json=arguments.as_json)
    run_and_exit(
        lambda: _run(arguments, output),
        output,
        input_errors=(SourceError, TableFileError, ValueError, OSError),
        service_error=AfterimageError,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.index_images",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder, table or tar")
    group = parser.add_argument_group("descriptions")
    group.add_argument("--collection", type=shared_collection_name, default="shared", help="default: %(default)s")
    group.add_argument("--tag", action="append", default=[], help="added to the tags of every image; may be repeated")
    group.add_argument("--licence", help="for images without a licence of their own")
    group.add_argument("--source", dest="origin", help="for images without a source of their own")
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"column of a table with another name; fields: file, {', '.join(DESCRIPTION_FIELDS)}",
    )
    group.add_argument("--format", choices=sorted(set(FORMATS.values())), help="of a table; default: by its suffix")
    group.add_argument("--update", action="store_true", help="apply changed descriptions to images already there")
    group = parser.add_argument_group("options")
    group.add_argument("--report", type=Path, metavar="FILE", help="write the result of each file, as JSON Lines")
    group.add_argument("--parallel", type=int, default=4, help="simultaneous uploads (default: %(default)s)")
    group.add_argument("--max-file-mb", type=float, default=16, help="larger files are skipped (default: %(default)g)")
    group.add_argument(
        "--wait",
        type=float,
        default=600,
        metavar="SECONDS",
        help="how long to wait until all images are searchable (default: %(default)g)",
    )
    group.add_argument("--strict", action="store_true", help="exit code 1 if an image was skipped")
    group.add_argument("--watch", action="store_true", help="a folder: also index later changes, until Ctrl-C")
    group.add_argument(
        "--delete",
        action="store_true",
        help="with --watch and --report: delete images whose file was deleted or changed, also before this start",
    )
    add_service_options(parser)
    add_output_options(parser)
    return parser


def _run(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    source: Path = arguments.source
    if not source.exists():
        raise SourceError(f"{source} does not exist")
    if arguments.watch and not source.is_dir():
        raise SourceError("--watch needs a folder")
    if arguments.delete and not (arguments.watch and arguments.report):
        raise SourceError("--delete needs --watch and --report: the report lists the files of the last run")
    given = {"licence": arguments.licence, "source": arguments.origin, "tags": arguments.tag}
    defaults = {name: value for name, value in given.items() if value}
    with client_from_options(arguments) as service, Report(arguments.report) as report:
        uploader = Uploader(
            service,
            arguments.collection,
            report,
            ImageDescription.model_validate(defaults),
            update=arguments.update or arguments.watch,
            parallel=max(1, arguments.parallel),
            max_file_bytes=int(arguments.max_file_mb * 2**20),
        )
        if arguments.watch:
            return watch_folder(uploader, source, output, delete=arguments.delete)
        files = read_source(
            source,
            columns=_columns(arguments),
            format=arguments.format,
            max_file_bytes=uploader.max_file_bytes,
        )
        skipped = index_files(uploader, files, output)
        return wait_and_print_summary(
            uploader, skipped, output, source=source, wait_s=arguments.wait, strict=arguments.strict
        )


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    columns = {}
    for pair in arguments.column:
        name, separator, column = pair.partition("=")
        if not separator or name not in ("file", *DESCRIPTION_FIELDS):
            raise SourceError(f"--column {pair}: write FIELD=COLUMN with one of file, {', '.join(DESCRIPTION_FIELDS)}")
        columns[name] = column
    return columns


if __name__ == "__main__":
    main()
