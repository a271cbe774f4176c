"""Back up the database and the blobs, and restore them; `--help` shows examples."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from ops.backup.backup_folder import Backup, BackupError, Manifest, complete_backups
from ops.backup.create import create
from ops.backup.prune import prune
from ops.backup.restore import restore
from ops.backup.verify import verify
from scripts.console import EXIT_CODES_HELP, ConsoleOutput, ExitCode, add_output_options, run_and_exit
from shared.errors import BaseAppException, DatabaseError

DESCRIPTION = """\
Back up the database and the blobs that its rows name, and restore them.

The service may run during a backup. A backup is the database as it was at one moment, with every blob that a row of
this moment names. The sweeper deletes nothing meanwhile.

The commands use the database and the blob store that the settings name. Run them where the services run."""

EXAMPLES = f"""\
examples:
  back up into a new folder below backups/; blobs that an earlier backup there has are not copied again
    python -m ops.backup create backups/

  back up the database, and only the digests of the blobs; for a bucket that has copies of its own
    python -m ops.backup create backups/ --reference-blobs

  read every byte of a backup, and compare it with its digests
    python -m ops.backup verify backups/20260131T020000Z

  restore into an empty database and an empty blob store
    python -m ops.backup restore backups/20260131T020000Z

  keep the seven newest backups
    python -m ops.backup prune backups/ --keep 7

{EXIT_CODES_HELP}"""


def main() -> None:
    arguments = _parser().parse_args()
    output = ConsoleOutput(quiet=arguments.quiet, as_json=arguments.as_json)
    run_and_exit(
        lambda: _run(arguments, output),
        output,
        input_errors=(BackupError, OSError, ValueError),
        service_error=BaseAppException,
    )


def _run(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    commands = {"create": _create, "list": _list, "verify": _verify, "restore": _restore, "prune": _prune}
    try:
        return commands[arguments.command](arguments, output)
    except DBAPIError as error:
        raise DatabaseError(str(error.orig).strip().partition("\n")[0]) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ops.backup",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    creating = commands.add_parser("create", help="make a new backup below a folder")
    listing = commands.add_parser("list", help="list the backups of a folder")
    verifying = commands.add_parser("verify", help="compare every byte of a backup with its digests")
    restoring = commands.add_parser("restore", help="restore a backup into an empty database and blob store")
    pruning = commands.add_parser("prune", help="remove old backups of a folder")
    for command in (creating, listing, pruning):
        command.add_argument("folder", type=Path)
    for command in (verifying, restoring):
        command.add_argument("backup", type=Path, help="folder of one backup")
    creating.add_argument(
        "--reference-blobs", action="store_true", help="leave the blobs in their storage, and keep only their digests"
    )
    pruning.add_argument("--keep", type=_count, required=True, metavar="N", help="number of backups to keep")
    for command in (creating, verifying, restoring):
        command.add_argument("--programs", type=Path, metavar="FOLDER", help="folder of another pg_dump and pg_restore")
    for command in (creating, listing, verifying, restoring, pruning):
        add_output_options(command)
    return parser


def _create(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    backup = create(arguments.folder, copies_blobs=not arguments.reference_blobs, programs=arguments.programs)
    manifest = backup.manifest()
    _report_problems(manifest.problems, output)
    output.event("created", path=str(backup.path), **_summary(manifest))
    output.info(f"{backup.path}: {_describe(manifest)}")
    return ExitCode.INCOMPLETE if manifest.problems else ExitCode.DONE


def _list(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    for backup in complete_backups(arguments.folder):
        output.event("backup", path=str(backup.path), **_summary(backup.manifest()))
        output.info(f"{backup.name}: {_describe(backup.manifest())}")
    return ExitCode.DONE


def _verify(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    backup = Backup(arguments.backup)
    problems = verify(backup, programs=arguments.programs)
    _report_problems(problems, output)
    output.event("verified", path=str(backup.path), problems=len(problems))
    if problems:
        return ExitCode.INCOMPLETE
    output.info(f"{backup.name} is intact: {_describe(backup.manifest())}")
    return ExitCode.DONE


def _restore(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    manifest = restore(Backup(arguments.backup), programs=arguments.programs)
    _report_problems(manifest.problems, output)
    output.event("restored", **_summary(manifest))
    output.info(f"Restored: {_describe(manifest)}")
    output.info("Run the migrations, then start the service.")
    if not manifest.copied:
        output.info("Then let it sweep its blobs: python -m scripts.admin sweep --adopt")
    return ExitCode.INCOMPLETE if manifest.problems else ExitCode.DONE


def _prune(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    backups, blobs = prune(arguments.folder, keep=arguments.keep)
    output.event("pruned", backups=backups, blobs=blobs)
    output.info(f"Removed {backups} backups, and {blobs} copies of blobs.")
    return ExitCode.DONE


def _report_problems(problems: Mapping[str, str], output: ConsoleOutput) -> None:
    for key, problem in problems.items():
        output.error(f"{key} is {problem}")


def _summary(manifest: Manifest) -> dict[str, object]:
    return manifest.model_dump(
        mode="json", include={"created_at", "version", "schema_revision", "blobs", "blob_bytes", "copied", "rows"}
    ) | {"problems": len(manifest.problems), "database_bytes": manifest.database.size_bytes}


def _describe(manifest: Manifest) -> str:
    where = "" if manifest.copied else ", which stay in their storage"
    return (
        f"release {manifest.version}, schema {manifest.schema_revision}, "
        f"database {manifest.database.size_bytes / 1e6:.1f} MB, "
        f"{manifest.blobs} blobs of {manifest.blob_bytes / 1e6:.1f} MB{where}"
    )


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("keep at least one backup")
    return count


if __name__ == "__main__":
    main()
