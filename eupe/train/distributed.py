"""Several workers in one process group, started and started again by Ray Train: all that training knows of Ray."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from eupe.cores import num_cores
from eupe.device import is_out_of_memory
from eupe.errors import ConfigError, EupeError, IncompleteError, TrainingError
from eupe.place import Place, Where
from eupe.stopping import stop_signals
from eupe.train.card import RunCard
from eupe.train.config import TrainConfig, parse_mix
from eupe.train.log import TrainStatus
from eupe.train.loop import TrainReport, train_as_worker
from eupe.train.stream import open_corpora
from eupe.train.world import World

RESTARTS = 10
"""Of the workers, before a run that loses them gives up; each goes on from the newest checkpoint."""
POLL_S = 0.5
RAY_FOLDER = ".ray-train"
"""Of Ray Train's own files in a run's directory; made for each training, and removed."""
AGREED = (IncompleteError, TrainingError)
"""Errors that all workers come to at the same step."""


class _Desk:
    """Where the first worker and the driver leave word for each other."""

    def __init__(self) -> None:
        self.told: list[tuple[int, TrainStatus]] = []
        self.stop_asked = False
        self.outcome: list[TrainReport] | EupeError | None = None

    def tell(self, place: int, status: TrainStatus) -> None:
        self.told.append((place, status))

    def shall_stop(self) -> bool:
        return self.stop_asked

    def end(self, outcome: list[TrainReport] | EupeError) -> None:
        """What a worker found wrong goes before what all of them came to."""
        if self.outcome is None or isinstance(self.outcome, AGREED):
            self.outcome = outcome

    def ask_to_stop(self) -> None:
        self.stop_asked = True

    def news(self) -> list[tuple[int, TrainStatus]]:
        news, self.told = self.told, []
        return news

    def result(self) -> list[TrainReport] | EupeError | None:
        return self.outcome


def train_on_ray(
    configs: Sequence[TrainConfig], cards: Sequence[RunCard], on_status: Callable[[int, TrainStatus], None]
) -> list[TrainReport]:
    """`train_as_worker` in `num_workers` processes, each with a share of every batch.

    The runs' directories, stores and pictures must be the same files for all of them.

    Raises: ConfigError if the cluster does not answer or has no room; TrainingError if workers keep dying; else as
        `train_as_worker`.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(f"--num-workers needs Ray Train: pip install 'eupe[cluster]' ({error})") from error
    config = configs[0]
    with _ray(config) as use_gpu:
        desk = ray.remote(num_cpus=0)(_Desk).remote()
        trainer = TorchTrainer(
            _work,
            train_loop_config={"configs": [_absolute(each) for each in configs], "cards": list(cards), "desk": desk},
            scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name=RAY_FOLDER,
                storage_path=str(config.out.absolute()),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        problem: list[Exception] = []
        running = threading.Thread(target=_fit, args=(trainer, problem), daemon=True)
        with stop_signals(signal.SIGINT, signal.SIGTERM) as stop_asked:
            running.start()
            while running.is_alive():
                running.join(POLL_S)
                if stop_asked():
                    desk.ask_to_stop.remote()
                for place, status in ray.get(desk.news.remote()):
                    on_status(place, status)
        outcome: list[TrainReport] | EupeError | None = ray.get(desk.result.remote())
        shutil.rmtree(config.out / RAY_FOLDER, ignore_errors=True)
        if isinstance(outcome, EupeError):
            raise outcome
        if outcome is None:
            raise TrainingError(
                f"run {config.out} lost its workers more than {RESTARTS} times, at last by: {_first_line(problem)}; "
                "go on with --resume"
            )
        return outcome


def _fit(trainer: Any, problem: list[Exception]) -> None:
    """In a thread, where Ray Train leaves signals alone."""
    try:
        trainer.fit()
    except Exception as error:
        problem.append(error)


def _first_line(problem: list[Exception]) -> str:
    return next(iter(str(problem[0]).splitlines()), "an error without words") if problem else "no error at all"


def _work(told: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    configs, cards, desk = told["configs"], told["cards"], told["desk"]
    if isinstance(ray.get(desk.result.remote()), EupeError):
        return
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    asked, ended = threading.Event(), threading.Event()

    def listen() -> None:
        while not ended.wait(POLL_S):
            if ray.get(desk.shall_stop.remote()):
                asked.set()

    def tell(place: int, status: TrainStatus) -> None:
        desk.tell.remote(place, status)

    if world.leads:
        threading.Thread(target=listen, daemon=True).start()
    try:
        outcome: list[TrainReport] | EupeError = train_as_worker(
            configs, cards, open_corpora(configs[0]), world, get_device(), tell, asked.is_set
        )
    except Exception as error:
        if (told_error := _for_the_user(error)) is not None:
            ray.get(desk.end.remote(told_error))
        if not isinstance(error, AGREED):
            raise  # so that workers that wait for this one are ended, too
        return
    finally:
        ended.set()
    if world.leads:
        ray.get(desk.end.remote(outcome))


def _for_the_user(error: Exception) -> EupeError | None:
    """What starting anew would not mend; None for what may be another worker's death."""
    if is_out_of_memory(error):
        words = next(iter(str(error).splitlines()), "")
        return TrainingError(f"a worker is out of memory ({words}); give more --accumulate, --recompute or --shard")
    return error if isinstance(error, EupeError) else None


def _absolute(config: TrainConfig) -> TrainConfig:
    """As workers see it, whose working directory is another."""
    mixes = parse_mix(config.mix, num_targets=len(config.targets))
    return replace(
        config,
        out=config.out.absolute(),
        init=None if config.init is None else config.init.absolute(),
        targets=tuple(_place(path) for path in config.targets),
        corpus=None if config.corpus is None else _place(config.corpus),
        mix=tuple(f"{mixed.share!r}:{','.join(map(_place, mixed.stores))}" for mixed in mixes),
    )


def _place(path: Where) -> str:
    place = Place.of(path)
    return str(place.local.absolute()) if place.is_local else str(place)


@contextmanager
def _ray(config: TrainConfig) -> Iterator[bool]:
    """Ray, started or joined; whether workers get a GPU each.

    Raises: ConfigError.
    """
    import ray

    from eupe.cluster import join_ray, start_ray

    if config.ray_address is not None:
        join_ray(config.ray_address)
    else:
        start_ray(num_cpus=max(num_cores(), config.num_workers))
    try:
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU", 0) else "CPU"
        if resources.get(kind, 0) < config.num_workers:
            raise ConfigError(
                f"--num-workers {config.num_workers} asks for a {kind} each, and there are {resources.get(kind, 0):g}; "
                "give fewer"
            )
        yield kind == "GPU"
    finally:
        ray.shutdown()
