"""Export a corpus or outputs to a Parquet file, and import such a file; `--help` shows examples.

The commands use the database and the blob store that the settings name, not the API.
"""

import argparse
from pathlib import Path

import pydantic

from scripts.console import EXIT_CODES_HELP, ConsoleOutput, add_output_options, collection_name, run_and_exit
from scripts.export.export_file import export_corpus, export_outputs
from scripts.export.image_file import ImageFileError
from scripts.export.import_file import UsageError, import_file
from shared.contracts.common import QueryMoment
from shared.errors import BaseAppException, ResourceNotFoundError

DESCRIPTION = """\
Export images to a Parquet file and import them, with their descriptions, bytes and vectors.

  corpus   a collection. Its images need not be embedded again in another installation: searches give the same answers
           with the same scores
  outputs  generated images, each with its whole record (prompt, parameters, seed, model and digest, references,
           versions), to keep, to audit, or to use as references elsewhere
  import   either file into a collection. Outputs become images with their own ids; an import never creates jobs

The commands use the database and the blob store that the settings name. Run them where the services run."""

EXAMPLES = f"""\
examples:
  export the shared corpus
    python -m scripts.export corpus corpus.parquet

  export a collection; if several owners have one of this name, the command names them, and --owner chooses
    python -m scripts.export corpus products.parquet --collection products

  import into another installation; existing images are not changed, so the command may be repeated
    python -m scripts.export import corpus.parquet
    python -m scripts.export import products.parquet --owner team-b --collection products

  export the outputs of all owners from January
    python -m scripts.export outputs 2026-01.parquet --after 2026-01-01T00:00:00Z --before 2026-02-01T00:00:00Z

  export the outputs of an owner with their CLIP vectors, then import them elsewhere as references
    python -m scripts.export outputs best.parquet --owner team-a --vectors
    python -m scripts.export import best.parquet --owner team-b --collection best

  read the file with any Parquet reader
    python -c "import pyarrow.parquet as p; print(p.read_table('2026-01.parquet', columns=['prompt', 'model_digest']))"

An import uses the vectors of the file if their embedding space is the active one there, or the first one. Otherwise the
workers embed the images again.

{EXIT_CODES_HELP}"""


def main() -> None:
    arguments = _parser().parse_args()
    output = ConsoleOutput(quiet=arguments.quiet, as_json=arguments.as_json)
    commands = {"corpus": export_corpus, "outputs": export_outputs, "import": import_file}
    run_and_exit(
        lambda: commands[arguments.command](arguments, output),
        output,
        input_errors=(ImageFileError, ResourceNotFoundError, UsageError, ValueError, OSError),
        service_error=BaseAppException,
        interrupt_message="Interrupted. The same command continues an import from here; an export starts again.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write a collection to a file")
    outputs = commands.add_parser("outputs", help="write generated images to a file")
    importing = commands.add_parser("import", help="read a file into a collection")
    for command in (corpus, outputs, importing):
        command.add_argument("file", type=Path)
    corpus.add_argument(
        "--owner", help="owner of the collection (default: the shared one, else the only one of the name)"
    )
    corpus.add_argument("--collection", type=collection_name, default="shared", help="default: %(default)s")
    outputs.add_argument("--owner", help="owner of the outputs (default: all owners)")
    outputs.add_argument("--after", type=_moment, metavar="TIME", help="created at or after this time")
    outputs.add_argument("--before", type=_moment, metavar="TIME", help="created before this time")
    outputs.add_argument(
        "--vectors", action="store_true", help="let the embed workers compute the vector of each image"
    )
    importing.add_argument("--owner", help="owner of the collection (default: a shared collection)")
    importing.add_argument(
        "--collection", type=collection_name, help="default: the collection's name in the file; required for outputs"
    )
    for command in (corpus, outputs, importing):
        add_output_options(command)
    return parser


def _moment(text: str) -> object:
    return pydantic.TypeAdapter(QueryMoment).validate_python(text)


if __name__ == "__main__":
    main()
