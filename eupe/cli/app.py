"""The command line: each verb builds a config and makes one call.

A verb lives in the file of its name. Heavy imports stay inside the verbs, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import eupe
import eupe.cli.language  # adds its verbs to `eval_app`
from eupe.cli.console import err, escaped, out
from eupe.cli.evaluate import eval_app
from eupe.cli.export import ExportOrCheck, export_run
from eupe.cli.extract import extract
from eupe.cli.finetune import finetune
from eupe.cli.index import index
from eupe.cli.plan import plan
from eupe.cli.run import run_recipe
from eupe.cli.store import store_app
from eupe.cli.students import students
from eupe.cli.teachers import teachers_app
from eupe.cli.train import train
from eupe.cli.viz import viz
from eupe.common.kinds import TRUST_VARIABLE
from eupe.errors import EupeError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=eupe.__doc__)
app.add_typer(teachers_app, name="teachers")
app.add_typer(eval_app, name="eval")
app.add_typer(store_app, name="store")
for verb in (index, extract, plan, train, finetune):
    app.command()(verb)
app.command()(students)
app.command("export", cls=ExportOrCheck)(export_run)
app.command("run")(run_recipe)
app.command()(viz)

INTERRUPTED = 130
"""Exit code of typer after Ctrl-C."""


def main(command: typer.Typer = app) -> None:
    """Run a command line; print one sentence for a user's mistake, never a traceback."""
    try:
        command(standalone_mode=True)
    except EupeError as error:
        err.print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            err.print("[bold red]error:[/] interrupted; run the same command again", soft_wrap=True)
        raise


def _version(asked: bool) -> None:
    if asked:
        out.print(eupe.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    trust_factory: Annotated[
        bool,
        typer.Option(
            "--trust-factory",
            envvar=TRUST_VARIABLE,
            help="Run the function that builds a student if a run, a recipe or a file of options names it.",
        ),
    ] = False,
) -> None:
    if trust_factory:
        os.environ[TRUST_VARIABLE] = "1"  # for the processes that a verb starts, too
