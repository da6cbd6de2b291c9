"""The command line: `main` runs it, `app` is its tree of verbs."""

from eupe.cli.app import app as app
from eupe.cli.app import main as main
