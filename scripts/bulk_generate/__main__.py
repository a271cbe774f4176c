"""Generate thousands of images from a file of prompts, a template, or both; `--help` shows examples."""

from afterimage_client import AfterimageError
from scripts.bulk_generate import options
from scripts.bulk_generate.folder import FolderError
from scripts.bulk_generate.plan import PlanError
from scripts.bulk_generate.run import dry_run, run
from scripts.console import ConsoleOutput, run_and_exit
from scripts.table_files import TableFileError


def main() -> None:
    arguments = options.parser().parse_args()
    output = ConsoleOutput(quiet=arguments.quiet, as_json=arguments.as_json)
    run_and_exit(
        lambda: dry_run(arguments, output) if arguments.dry_run else run(arguments, output),
        output,
        input_errors=(PlanError, TableFileError, FolderError, ValueError, OSError),
        service_error=AfterimageError,
        interrupt_message="Interrupted. The service continues with the items it has. The same command downloads them; "
        "--cancel stops them.",
    )


if __name__ == "__main__":
    main()
