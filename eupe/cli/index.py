"""`eupe index`: the pictures of a corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from eupe.cli.console import err, escaped, finish, out
from eupe.cli.options import (
    CorpusPath,
    Exclude,
    ImageColumn,
    ImageKey,
    Include,
    Json,
    LabelColumn,
    Overwrite,
)
from eupe.errors import ConfigError

NAMED_DUPLICATES = 5


def index(
    corpus: CorpusPath,
    out_path: Annotated[str, typer.Option("--out", help="The index to write (.parquet).")],
    include: Include = None,
    exclude: Exclude = None,
    image_key: ImageKey = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """List and hash the pictures of a corpus; after an interruption, the same command resumes."""
    from eupe.common.progress import report_progress
    from eupe.corpus.choice import Choice
    from eupe.corpus.index import some_keys
    from eupe.corpus.left_out import Patterns, told
    from eupe.corpus.resumable import make_index

    if not out_path.endswith(".parquet"):
        raise ConfigError(f"--out {out_path} must end in .parquet")
    with report_progress(err, "pictures", quiet=as_json) as progress:
        found = make_index(
            corpus,
            out_path,
            patterns=Patterns(tuple(include or ()), tuple(exclude or ())),
            progress=lambda done, of: progress.update("indexing", done, of),
            choice=Choice(image_key, image_column, label_column),
            overwrite=overwrite,
        )
    unreadable = found.samples["sha256"].null_count
    duplicates = found.duplicates
    facts = {"index": out_path, "found": found.num_found, "pictures": len(found), "left_out": found.left_out}
    facts |= {"unreadable": unreadable, "fingerprint": found.fingerprint}
    if as_json:
        print(json.dumps({**facts, "notes": list(found.notes), "duplicates": duplicates}))
        return
    facts["left_out"] = told(found.left_out)
    finish({**facts, "duplicates": sum(len(keys) - 1 for keys in duplicates)}, as_json)
    _print_notes(found.notes)
    for keys in duplicates[:NAMED_DUPLICATES]:
        out.print(f"the same picture: {some_keys(keys)}", markup=False)
    if len(duplicates) > NAMED_DUPLICATES:
        out.print(f"... and {len(duplicates) - NAMED_DUPLICATES} more such groups; --json names them all")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        out.print(f"note: {escaped(note)}", soft_wrap=True)
