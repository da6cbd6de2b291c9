"""A store's statistics in words, for the terminal and for the page."""

from __future__ import annotations

from eupe.store.layout import DENSE
from eupe.store.stats import OUTLIER_RATIO
from eupe.store.summary import FIRST_COMPONENTS, StoreSummary, TokenSummary

SHOWN_CHANNELS = 5
Facts = list[tuple[str, str]]
"""Names and values, in reading order."""


def identity(summary: StoreSummary) -> Facts:
    """Return facts about the store as a whole."""
    spec, teacher = summary.spec, summary.spec.teacher
    return [
        ("teacher", f"{teacher['name']} ({teacher['backend']}: {teacher['model']}), {teacher['dtype']}"),
        ("licence of the weights", str(teacher["licence"])),
        ("pictures", _pictures(summary)),
        ("views", _views(summary)),
        ("sizes", ", ".join(f"{s} px ({_grid(g)})" for s, g in zip(spec.sizes, spec.grids, strict=True))),
        ("precision", ", ".join(f"{kind} {spec.precision[kind]}" for kind in spec.tokens)),
        ("fidelity measured", _fidelity(summary)),
        ("on disk", f"{_bytes(summary.stored_bytes)}, {summary.stored_share:.1%} of raw float16"),
        ("completeness", f"finished, all {_count(spec.num_parts, 'part')}"),
        ("values clipped / not finite", f"{summary.num_clipped:,} / {summary.num_nonfinite:,}"),
    ]


def _pictures(summary: StoreSummary) -> str:
    failed = f", {summary.num_failed:,} of them failed" if summary.num_failed else ", all with features"
    return f"{summary.spec.num_samples:,}{failed}"


def _views(summary: StoreSummary) -> str:
    views = summary.spec.views
    if views["policy"] != "rrc":
        return {"center": "the centre of each picture", "squash": "each whole picture, squashed"}[views["policy"]]
    return f"{_count(summary.spec.num_views, 'random resized crop')} of each picture, seed {views['seed']}"


def _grid(side: int) -> str:
    return f"{side} × {side} cells"


def _fidelity(summary: StoreSummary) -> str:
    measured = [(token.fidelity["p5"], token.path) for token in summary.tokens if token.fidelity is not None]
    if not measured:
        return "not measured"
    worst, path = min(measured)
    return f"95% of tokens at a cosine of at least {worst:.6g} ({path})"


def token_title(token: TokenSummary) -> str:
    """Return a title like `224 px dense`."""
    return f"{token.size} px {token.kind}"


def token_facts(token: TokenSummary) -> Facts:
    """Return facts about one kind of token at one size."""
    facts = [
        ("vectors", f"{token.count:,}"),
        ("channels", str(token.num_channels)),
        ("norm, mean / median*", f"{token.mean_norm:.4g} / {token.median_norm:.4g}"),
        ("std of channels, least / median / largest", " / ".join(f"{std:.4g}" for std in token.std_range)),
        ("dead channels", _dead_channels(token)),
        ("effective rank†", f"{token.effective_rank:.1f} of {token.num_channels}"),
        (
            f"variance of the first {' / '.join(map(str, FIRST_COMPONENTS))} components",
            " / ".join(f"{token.explained(k):.1%}" for k in FIRST_COMPONENTS),
        ),
    ]
    if token.fidelity is not None:
        cosines = f"{token.fidelity['mean']:.6g} / {token.fidelity['p5']:.6g}"
        facts.insert(2, ("cosine to the teacher, mean / 5th percentile", cosines))
    if token.kind == DENSE:
        share = f"{token.outlier_share:.3%}" if token.outlier_share else "none"
        facts += [("outlier tokens‡", share), ("cell with most outliers (share of views)", outlier_place(token))]
    return facts


def _dead_channels(token: TokenSummary) -> str:
    dead = token.dead_channels
    if not dead:
        return "none"
    more = ", …" if len(dead) > SHOWN_CHANNELS else ""
    return f"{len(dead)} ({', '.join(map(str, dead[:SHOWN_CHANNELS]))}{more})"


def outlier_place(token: TokenSummary) -> str:
    """Return in words the cell with the most outliers, and the share of views in which its token is one."""
    cell, rates = token.outlier_cell, token.outlier_rates
    if cell is None or rates is None:
        return "no cell"
    return f"row {cell[0]}, column {cell[1]} ({rates[cell]:.1%})"


NOTES = (
    "* from a histogram in quarter octaves; the mean is accurate to 9%.",
    "† participation ratio of the covariance's eigenvalues, (Σλ)² / Σλ².",
    f"‡ norm above {OUTLIER_RATIO:g} times the median of the token's view; rows and columns count from 0.",
)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
