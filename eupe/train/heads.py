"""Adapter heads, from the student's width to each teacher's; not part of the exported student."""

from __future__ import annotations

from torch import Tensor, nn

from eupe.tokens import Tokens


class AdapterHead(nn.Sequential):
    """A head from [..., in_dim] to [..., out_dim]: linear (no bias), LayerNorm, GELU, linear (no bias).

    Source: EUPE, arXiv 2603.22387, adapter heads; hidden width 1536 for the proxy, 3072 for students.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden_dim, bias=False),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim, bias=False),
        )


class TargetHeads(nn.Module):
    """The heads of one target, one for the summary and one for dense tokens; a width of 0 leaves that head out."""

    def __init__(self, student: tuple[int, int], target: tuple[int, int], hidden_dim: int) -> None:
        """Build the heads; `student` and `target` are (summary width, dense width)."""
        super().__init__()
        self.summary = AdapterHead(student[0], hidden_dim, target[0]) if target[0] else None
        self.dense = AdapterHead(student[1], hidden_dim, target[1]) if target[1] else None

    def forward(self, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
        """Predict the target's summary [B, Ds] and dense tokens [B, h, w, D], on the student's grid."""
        summary = None if self.summary is None else self.summary(tokens.summary)
        dense = None if self.dense is None else self.dense(tokens.dense)
        return summary, dense
