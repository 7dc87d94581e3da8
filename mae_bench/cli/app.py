"""The command line `mae-bench`: the list of its commands, its exit codes and its error output."""

import inspect
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from mae_bench.cli import checkpoints, data, lists, suites
from mae_bench.cli.options import Json
from mae_bench.cli.output import FAILED, INTERRUPTED, USAGE_ERROR, print_answer, print_json
from mae_bench.errors import Interrupted, UserError
from mae_bench.files import is_full
from mae_bench.lifetime import bind_forks
from mae_bench.registry import PACKAGES, check_not_hidden

FREE_SPACE = "free some space and re-run the same command to resume"

app = typer.Typer(
    name="mae-bench",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted.

    A failure is a cell that failed while the others ran, or a full disk.
    """
    bind_forks()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8, as on stderr
    try:
        _check_arguments()
        for package in PACKAGES:
            check_not_hidden(package)
        try:
            app()
        finally:
            sys.stdout.flush()
    except UserError as error:
        _exit_with(error, FAILED if _is_full(error.__cause__) else USAGE_ERROR)
    except OSError as error:  # for example a folder that cannot be written; the message includes its path
        if not _is_full(error):
            _exit_with(UserError(str(error)), USAGE_ERROR)
        place = f"for {error.filename}" if error.filename else "where this command writes, or its output goes"
        _exit_with(
            UserError(f"the disk is full: {error}", expected=f"free space {place}", fix=FREE_SPACE), FAILED
        )
    except Interrupted:
        if os.environ.get("RANK", "0") == "0":
            print("Stopped; finished work is saved. Re-run the same command to resume.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _check_arguments() -> None:
    """Raise UserError for an argument that is not text: records keep the command line."""
    for argument in sys.argv[1:]:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(
                f"the argument {argument!r} is not UTF-8", expected="text; names of files in UTF-8"
            )


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and is_full(error)


def _exit_with(error: UserError, code: int) -> NoReturn:
    """Print the error to stderr, and with `--json` also as JSON to stdout, then exit with `code`."""
    print(f"Error: {error}", file=sys.stderr)
    if "--json" in sys.argv:
        print_json({"error": error.given, "expected": error.expected, "fix": error.fix})
    try:
        sys.stdout.flush()
    except OSError:  # a full disk behind it: what is left in the buffer would fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"mae-bench {version('mae_bench')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Downstream transfer benchmark for masked autoencoders: pretrain, transfer, compare.

    Exit codes: 0 success, 1 failure (a cell failed and the others ran, or a full disk), 2 usage error, 130
    interrupted.
    """


def doctor(as_json: Json = False) -> None:
    """Print versions, devices and installed optional packages, with the install command for missing ones."""
    from mae_bench.environment.doctor import examine, render

    found = examine()
    print_answer(found, render(found), as_json)
    if found["problems"]:
        raise typer.Exit(FAILED)


for command in (
    suites.demo,
    suites.run,
    suites.pretrain,
    suites.evaluate,
    suites.plan,
    suites.report,
    checkpoints.inspect,
    checkpoints.convert,
    checkpoints.verify,
    checkpoints.reconstruct,
    doctor,
):
    app.command()(command)
app.command("list")(lists.list_)
app.add_typer(data.app, name="data")


def _join_paragraphs(typer_app: typer.Typer) -> None:
    """Let the terminal wrap the help of every command: typer keeps the line breaks of docstrings."""
    for registered in typer_app.registered_commands:
        paragraphs = (inspect.getdoc(registered.callback) or "").split("\n\n")
        registered.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for group in typer_app.registered_groups:
        if group.typer_instance is not None:
            _join_paragraphs(group.typer_instance)


_join_paragraphs(app)
