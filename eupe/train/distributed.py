"""Training in several workers of one process group, started and restarted by Ray Train; only this module uses Ray."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from eupe.common.compute import is_out_of_memory
from eupe.common.cores import num_cores
from eupe.common.signals import stop_signals
from eupe.common.storage import AnyPath, StoragePath
from eupe.errors import ConfigError, EupeError, IncompleteError, TrainingError
from eupe.train.config import TrainConfig, parse_mix
from eupe.train.log import TrainStatus
from eupe.train.loop import TrainReport, train_as_worker
from eupe.train.parallel import World
from eupe.train.run_spec import RunSpec
from eupe.train.stream import open_corpora

RESTARTS = 10
"""Restarts of the workers before a run gives up; each resumes from the newest checkpoint."""
POLL_S = 0.5
RAY_FOLDER = ".ray-train"
"""Folder of Ray Train's own files in a run's directory; made for each training and removed afterwards."""
AGREED = (IncompleteError, TrainingError)
"""Errors that all workers raise at the same step."""


class _Desk:
    """A Ray actor through which the workers and the driver exchange messages."""

    def __init__(self) -> None:
        self.told: list[tuple[int, TrainStatus]] = []
        self.stop_asked = False
        self.outcome: list[TrainReport] | EupeError | None = None

    def tell(self, place: int, status: TrainStatus) -> None:
        self.told.append((place, status))

    def shall_stop(self) -> bool:
        return self.stop_asked

    def end(self, outcome: list[TrainReport] | EupeError) -> None:
        """Record the outcome; one worker's own error takes precedence over an error that all workers raise."""
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
    configs: Sequence[TrainConfig], specs: Sequence[RunSpec], on_status: Callable[[int, TrainStatus], None]
) -> list[TrainReport]:
    """Run `train_as_worker` in `num_workers` processes, each with a share of every batch.

    The paths of the runs, stores and pictures must lead to the same files in all processes.

    Raises: ConfigError if the cluster does not answer or has no room; TrainingError if workers keep dying; otherwise as
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
        # it reserves no CPU: the cluster may have just one per worker
        desk = ray.remote(num_cpus=0)(_Desk).remote()
        trainer = TorchTrainer(
            _work,
            train_loop_config={"configs": [_absolute(each) for each in configs], "specs": list(specs), "desk": desk},
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
                f"run {config.out} lost its workers more than {RESTARTS} times (last error: {_first_line(problem)}); "
                "resume it with --resume"
            )
        return outcome


def _fit(trainer: Any, problem: list[Exception]) -> None:
    """Run Ray Train in a thread, where it installs no signal handlers."""
    try:
        trainer.fit()
    except Exception as error:
        problem.append(error)


def _first_line(problem: list[Exception]) -> str:
    return next(iter(str(problem[0]).splitlines()), "one without a message") if problem else "none"


def _work(told: dict[str, Any]) -> None:
    """Train in one worker; Ray Train runs this function in every worker process."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    configs, specs, desk = told["configs"], told["specs"], told["desk"]
    # Ray has restarted the workers; an error already recorded for the user would only occur again
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

    if world.is_main_process:
        # the other workers learn of it in `World.any`
        threading.Thread(target=listen, daemon=True).start()
    try:
        outcome: list[TrainReport] | EupeError = train_as_worker(
            configs, specs, open_corpora(configs[0]), world, get_device(), tell, asked.is_set
        )
    except Exception as error:
        if (told_error := _for_the_user(error)) is not None:
            # wait until it is recorded, because this process may be killed as soon as it raises
            ray.get(desk.end.remote(told_error))
        if not isinstance(error, AGREED):
            raise  # so that Ray also ends the workers that wait for this one
        return
    finally:
        ended.set()
    if world.is_main_process:
        ray.get(desk.end.remote(outcome))


def _for_the_user(error: Exception) -> EupeError | None:
    """Return an error that a restart would not fix; None if the cause may be another worker's death."""
    if is_out_of_memory(error):
        words = next(iter(str(error).splitlines()), "")
        return TrainingError(f"a worker is out of memory ({words}); raise --accumulate, or give --recompute or --shard")
    return error if isinstance(error, EupeError) else None


def _absolute(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute paths, because workers run in another directory."""
    mixes = parse_mix(config.mix, num_targets=len(config.targets))
    return replace(
        config,
        out=config.out.absolute(),
        init=None if config.init is None else config.init.absolute(),
        targets=tuple(_place(path) for path in config.targets),
        corpus=None if config.corpus is None else _place(config.corpus),
        mix=tuple(f"{mixed.share!r}:{','.join(map(_place, mixed.stores))}" for mixed in mixes),
    )


def _place(path: AnyPath) -> str:
    place = StoragePath.of(path)
    return str(place.local.absolute()) if place.is_local else str(place)


@contextmanager
def _ray(config: TrainConfig) -> Iterator[bool]:
    """Start or join Ray; yield whether each worker gets a GPU.

    Raises: ConfigError if Ray does not start or answer, or has too few GPUs or CPUs.
    """
    import ray

    from eupe.common.cluster import join_ray, start_ray

    if config.ray_address is not None:
        join_ray(config.ray_address)
    else:
        start_ray(num_cpus=max(num_cores(), config.num_workers))
    try:
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU", 0) else "CPU"
        if resources.get(kind, 0) < config.num_workers:
            raise ConfigError(
                f"--num-workers {config.num_workers} needs a {kind} per worker, but there are only "
                f"{resources.get(kind, 0):g}; give fewer"
            )
        yield kind == "GPU"
    finally:
        ray.shutdown()
