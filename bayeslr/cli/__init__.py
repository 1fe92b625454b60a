"""The command line: thin verbs over the library, one file a group of verbs.

Files here import nothing heavier than typer at module level, so that ``--help`` is immediate.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bayeslr import __version__
from bayeslr.cli.compare import compare
from bayeslr.cli.data import check, import_app
from bayeslr.cli.model import calibrate, fit, predict, report
from bayeslr.cli.plan import plan
from bayeslr.cli.priors import priors_app
from bayeslr.cli.replay import replay
from bayeslr.cli.sweeps import quickstart, status, sweep, worker
from bayeslr.cli.transfer import transfer_app
from bayeslr.errors import BayeslrError, StorageError

app = typer.Typer(
    name="bayeslr",
    help="Predict the learning rate of a large pre-training run from cheap proxy runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bayeslr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version,
                     is_eager=True),
    ] = False,
) -> None:  # fmt: skip
    pass


app.command()(quickstart)
app.add_typer(import_app, name="import")
app.command()(check)
app.command()(fit)
app.command()(predict)
app.command()(plan)
app.command()(sweep)
app.command()(worker)
app.command()(status)
app.command()(report)
app.command()(calibrate)
app.command()(replay)
app.command()(compare)
app.add_typer(priors_app, name="priors")
app.add_typer(transfer_app, name="transfer")


_INTERRUPTED = 130


def main() -> None:
    """Entry point: a user's mistake ends in one readable message, never in a traceback."""
    try:
        app()
    except BayeslrError as error:
        print(f"bayeslr: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # so typer ends an interrupted command, without a word
            print("bayeslr: interrupted; what was finished is kept", file=sys.stderr)  # noqa: T201
        raise
    except OSError as error:
        print(f"bayeslr: {_refused(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(StorageError.exit_code)


def _refused(error: OSError) -> str:
    """What the operating system refused, where, and what to do."""
    if error.filename is None:
        return f"the operating system refused: {error}; mend that, and repeat"
    return (
        f"cannot use {error.filename}: {error.strerror or error}; see that the path is right (a "
        "file or a folder, as is meant) and may be read and written, or name another place"
    )
