import math
from itertools import pairwise

import pytest
import torch

from eupe.common.compute import Tokens
from eupe.train.model import AdapterHead, TargetHeads
from eupe.train.trainer import learning_rate, peak_rate


def test_a_head_is_linear_norm_gelu_linear() -> None:
    head = AdapterHead(4, 8, 6)
    x = torch.randn(3, 4)
    hidden = x @ head[0].weight.T
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(head(x), hidden @ head[3].weight.T)
    assert {name for name, _ in head.named_parameters()} == {"0.weight", "1.weight", "1.bias", "3.weight"}


def test_heads_go_from_the_students_widths_to_the_targets() -> None:
    heads = TargetHeads((4, 5), (6, 7), 8)
    summary, dense = heads(Tokens(summary=torch.randn(2, 4), dense=torch.randn(2, 3, 3, 5)))
    assert summary is not None and summary.shape == (2, 6)
    assert dense is not None and dense.shape == (2, 3, 3, 7)
    only_dense = TargetHeads((4, 5), (0, 7), 8)
    assert only_dense(Tokens(summary=torch.randn(2, 4), dense=torch.randn(2, 3, 3, 5)))[0] is None


def test_a_base_rate_is_that_of_a_batch_of_64_and_grows_with_its_root() -> None:
    assert peak_rate(2e-5, scaling=None, batch_size=8192) == 2e-5
    assert peak_rate(2e-5, scaling="sqrt", batch_size=64) == pytest.approx(2e-5)
    assert peak_rate(2e-5, scaling="sqrt", batch_size=8192) == pytest.approx(2.263e-4, rel=1e-3)
    assert peak_rate(1e-5, scaling="sqrt", batch_size=4096) == pytest.approx(8e-5)


def test_warm_up_rises_to_the_peak_and_cosine_falls_to_nothing() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[-1] < 0.001
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
