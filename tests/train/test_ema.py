"""The moving average against a naive loop, and that it gives back what it borrowed."""

import copy
from pathlib import Path

import pytest
import torch
from making import tiny_config
from torch import nn

from eupe.store import Store
from eupe.train.checkpoint import load_checkpoint, save_checkpoint
from eupe.train.model import Ema
from eupe.train.parallel import World
from eupe.train.run_spec import resolve
from eupe.train.stream import open_corpora
from eupe.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def wander(module: nn.Module, steps: int, ema: Ema, *, rises: bool = False) -> list[dict[str, torch.Tensor]]:
    """The module's values at the start and after each of some steps, after which the average is updated."""
    states = [copy.deepcopy(module.state_dict())]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for step in range(steps):
        module(torch.randn(8, 3) * 2 + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step if rises else None)
        states.append(copy.deepcopy(module.state_dict()))
    return states


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_averages_are_those_of_a_naive_loop_in_float64_also_of_batch_norms_statistics(
    module: nn.Module, decay: float, rises: bool
) -> None:
    ema = Ema(module, decay)
    states = wander(module, 30, ema, rises=rises)
    floating = [name for name, value in states[0].items() if value.is_floating_point()]
    assert "1.running_mean" in floating and "1.running_var" in floating
    assert list(ema.state_dict()) == floating
    for name in floating:
        expected = states[0][name].double()
        for step, state in enumerate(states[1:]):
            now = min(decay, (1 + step) / (10 + step)) if rises else decay
            expected = now * expected + (1 - now) * state[name].double()
        torch.testing.assert_close(ema.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ema.state_dict()["2.weight"], states[-1]["2.weight"])


def test_averages_of_half_precision_weights_are_kept_in_float32() -> None:
    """A bfloat16 average would stay 1 forever, because 0.999 times 1 plus 0.001 times 2 is rounded to 1."""
    module = nn.Linear(1, 1).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema = Ema(module, 0.999)
        module.weight.fill_(2.0)
    for _ in range(1000):
        ema.update()
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(2 - 0.999**1000, rel=1e-4)


def test_while_applied_the_module_has_its_averages_and_afterwards_its_own_values_to_the_bit(
    module: nn.Module,
) -> None:
    ema = Ema(module, 0.9)
    own = wander(module, 5, ema)[-1]
    averages = {name: value.clone() for name, value in ema.state_dict().items()}
    with torch.no_grad(), ema.applied():
        state = module.state_dict()
        assert all(torch.equal(state[name], average) for name, average in averages.items())
        assert torch.equal(state["1.num_batches_tracked"], own["1.num_batches_tracked"])
    assert_same(module.state_dict(), own)
    assert_same(ema.state_dict(), averages)


def test_an_exception_while_applied_leaves_the_modules_own_values(module: nn.Module) -> None:
    ema = Ema(module, 0.9)
    own = wander(module, 5, ema)[-1]
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    assert_same(module.state_dict(), own)


def test_averages_go_through_a_checkpoint_to_the_bit(tiny_store: Store, tmp_path: Path) -> None:
    config = tiny_config(tiny_store.path, tmp_path, student="test_resnet", steps=1, batch_size=4, head_width=8, ema=0.9)
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    saved, loaded = (Trainer(config, spec, corpora[0], world=World(), device=CPU) for _ in range(2))
    assert saved.ema is not None and loaded.ema is not None
    with torch.no_grad():
        for value in saved.distiller.state_dict().values():
            if value.is_floating_point():
                value += torch.rand_like(value)
    for parameter in saved.distiller.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.optimizer.step()
    saved.ema.update()
    assert any(name.endswith("running_var") for name in saved.ema.state_dict())
    save_checkpoint(tmp_path, saved.state.tensors(), step=1, keep=1, keep_every=None, dtype="fp32")
    load_checkpoint(tmp_path, loaded.state, step=1, dtype="fp32")
    assert_same(loaded.ema.state_dict(), saved.ema.state_dict())
    with loaded.averaged():
        applied = loaded.distiller.state_dict()
        assert all(torch.equal(applied[name], value) for name, value in saved.ema.state_dict().items())
