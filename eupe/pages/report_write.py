"""Writing of reports: from runs and files of results to a page, or to Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eupe.errors import ConfigError
from eupe.outputs import MARKDOWN_MARK
from eupe.pages.page import make_place, write_whole
from eupe.pages.report import Merged, merge
from eupe.pages.report_inputs import gather
from eupe.pages.report_licences import Licence, licences
from eupe.pages.report_maps import draw_maps
from eupe.pages.report_page import render_report
from eupe.pages.report_words import markdown
from eupe.place import Where

TITLE = "Models, side by side"
PAGE, MARKDOWN = ".html", ".md"


@dataclass(frozen=True)
class Report:
    """A report, and where it was written."""

    merged: Merged
    licences: tuple[Licence, ...]
    out: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        out = None if self.out is None else str(self.out)
        return {"out": out, **self.merged.to_json(), "licences": [asdict(each) for each in self.licences]}


def write_report(
    places: Sequence[Path],
    *,
    out: Path | None = None,
    images: Where | None = None,
    limit: int = 6,
    title: str = TITLE,
    overwrite: bool = False,
) -> Report:
    """Merge results, and write them if `out` is given.

    Args:
        places: runs, and files of results.
        out: file name that ends in .html or .md.
        images: pictures of which a page shows the runs' maps.
        limit: the most pictures to show.
        overwrite: replace what is there, whoever made it.
    Raises: ConfigError, RunError, CorpusError, TeacherError; StorageError if `out` cannot be written.
    """
    if out is not None and out.suffix not in (PAGE, MARKDOWN):
        raise ConfigError(f"--out {out} must end in {PAGE} for a page or in {MARKDOWN} for Markdown")
    if images is not None and (out is None or out.suffix != PAGE):
        raise ConfigError(f"--images is for pages: give --out with a name that ends in {PAGE}, or leave it out")
    merged = merge(gather(places))
    place = None
    if out is not None:
        sources = [*places, *([] if images is None else [images])]
        place = make_place(out, sources=sources, overwrite=overwrite)
    found = tuple(licences(merged.models))
    if place is not None and place.suffix == MARKDOWN:
        # file names that are not UTF-8 come as surrogates, which only errors="replace" encodes
        heading, rest = markdown(merged, title=title).split("\n", 1)
        write_whole(place, f"{heading}\n\n{MARKDOWN_MARK}\n{rest}".encode(errors="replace"))
    elif place is not None:
        runs = {m.name: m.run for m in merged.models if m.run is not None and not m.untrained}
        maps = None if images is None else draw_maps(runs, images, limit=limit)
        read = [str(place) for place in places]
        page = render_report(merged, title=title, sources=read, licences=found, maps=maps)
        write_whole(place, page.encode(errors="replace"))
    return Report(merged, found, out)
