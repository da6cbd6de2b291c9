"""The run spec: everything that decides a run's outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eupe.common.kinds import WEIGHTS_FILE
from eupe.common.option import options_of
from eupe.common.reading import read_json
from eupe.errors import ConfigError, RunError
from eupe.models.encoder import check_student, encoder_layers, has_batch_norm, on_paper
from eupe.models.encoder_spec import load_encoder_spec, near, why_no_run
from eupe.models.outside import is_factory, require_trust, source_digest
from eupe.models.pretrained import has_tag, library_weights
from eupe.store import Store
from eupe.store.layout import KINDS
from eupe.train.config import (
    ENCODER_LR_MULT,
    FROZEN_NORMS,
    FROZEN_SHARE,
    RUNNING_NORMS,
    MixedIn,
    TrainConfig,
    parse_mix,
)
from eupe.train.layers import LAYERS, chosen_pairs, pairs_of, require_same_layers
from eupe.train.relations import RELATIONS
from eupe.train.targets import HoldoutBy, TargetSet

CONFIG_FILE = "config.json"
HEADS_FILE = "heads.safetensors"
NORMS_FILE = "norms.safetensors"
REPORT_FILE = "report.json"
METHOD = "method"
"""Key in a spec's `config`: the version of the training method beyond the options; 1 if the spec has no such key.

1: pictures are held out by key, the decay of `--ema` is fixed, `--photometric` gives all views of a picture the same
colours in a step, and channels that hardly vary are normalised like all others.
2: pictures are held out by content, the decay rises, each view gets its own colours, `normalise.LEAST_STD` applies,
and the number of views that a batch norm sees is part of the run's identity.
3: an encoder from `--init` under heads that are not is protected by default (see `encoder_schedule`), and one of
convolutions computes channels last, which changes its rounding.
"""
NEWEST_METHOD = 3
PROTECTION = ("freeze_encoder", "encoder_lr_mult", "batch_norms")
"""Options that protect an encoder from `--init` from heads that are not."""
VERSIONED = ("eupe", "torch", "timm", "pillow")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides a run's outcome, stored as `config.json`; two runs with equal specs are the same run."""

    config: dict[str, Any]
    targets: tuple[dict[str, Any], ...]
    """Per store: path, fingerprint of its spec, teacher, digest of the teacher's weights, licence, widths."""
    mix: tuple[dict[str, Any], ...] = ()
    """Per mixed-in corpus: its `share`, and its `targets` in the same form."""
    pictures: tuple[str, ...]
    """Per corpus: a digest of the keys that all its targets have."""
    total_steps: int
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the libraries that train; other versions do not make it another run."""

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> RunSpec:
        """Build a spec from its JSON form.

        Raises: TypeError, KeyError.
        """
        spec = cls(**{**plain, **{name: tuple(plain[name]) for name in ("targets", "mix", "pictures")}})
        if not isinstance(spec.config, dict) or not isinstance(spec.versions, dict):
            raise TypeError("config and versions are not both objects")
        if type(spec.total_steps) is not int:
            raise TypeError("total_steps is not a whole number")
        targets = [*spec.targets, *_mixed_in(spec)]
        if not all(isinstance(target[word], str) for target in targets for word in ("teacher", "licence")):
            raise TypeError("a target's teacher or licence is not a string")
        return spec

    @property
    def size(self) -> int:
        """Return the student's first input size in pixels, at which it is validated."""
        return int(self.config["size"][0])

    @property
    def target_sizes(self) -> list[tuple[int, ...]]:
        """Return, per target, the feature sizes that each step draws from."""
        return [tuple(sizes) for sizes in self.config["target_size"]]

    def differences(self, other: RunSpec) -> list[str]:
        """Return one phrase per difference that makes the other spec another run's; targets' paths do not count."""
        phrases = [
            f"{name}: was {self.config.get(name)}, now {other.config.get(name)}"
            for name in sorted({*self.config, *other.config})
            # as JSON: a spec that was read back has lists where a new one has tuples
            if _plain(self.config.get(name)) != _plain(other.config.get(name))
        ]
        if self.total_steps != other.total_steps:
            phrases.append(f"steps: was {self.total_steps}, now {other.total_steps}")
        for what, stores in (("targets", _targets), ("mix", _mixed_in)):
            was, now = stores(self), stores(other)
            if [store["fingerprint"] for store in was] != [store["fingerprint"] for store in now]:
                places = [", ".join(store["path"] for store in stores) or "none" for stores in (was, now)]
                phrases.append(
                    f"{what}: was {places[0]}, now {places[1]}, or the stores were re-extracted with different settings"
                )
        if [mixed["share"] for mixed in self.mix] != [mixed["share"] for mixed in other.mix]:
            phrases.append("the shares of --mix differ")
        if self.pictures != other.pictures and len(self.pictures) == len(other.pictures):
            phrases.append("the set of pictures that all targets have differs (a store was repaired or extended)")
        return phrases


def read_run_spec(run: Path) -> RunSpec:
    """Read the spec of a training run.

    Raises: RunError if there is none.
    """
    try:
        return RunSpec.from_json(read_json(run / CONFIG_FILE))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(why_no_run(run, CONFIG_FILE, error)) from error


def is_run(path: Path) -> bool:
    """Return whether a folder holds a training run; a `config.json` alone may be another library's."""
    try:
        read_run_spec(path)
    except RunError:
        return False
    return True


def finished_run_spec(run: Path) -> RunSpec:
    """Read the spec of a finished run.

    Raises: RunError if there is no run, or an unfinished one.
    """
    spec = read_run_spec(run)
    if not (run / REPORT_FILE).exists():
        raise RunError(f"run {run} is not finished: it has no {REPORT_FILE}; finish it with `eupe train ... --resume`")
    return spec


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that train."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _targets(spec: RunSpec) -> list[dict[str, Any]]:
    return list(spec.targets)


def _mixed_in(spec: RunSpec) -> list[dict[str, Any]]:
    return [store for mixed in spec.mix for store in mixed["targets"]]


def resolve(config: TrainConfig, corpora: Sequence[TargetSet]) -> RunSpec:
    """Resolve a config to the spec of its run: fill in defaults, turn epochs into steps, describe the targets.

    Args:
        corpora: the targets of `config.targets`, then those of `config.mix`.
    Raises: ConfigError if the student is unknown, names pretrained weights, or cannot be trained at a size; if a store
        lacks a size; if the batch exceeds the training views of a corpus; or if a corpus holds out no picture.
    """
    targets = corpora[0]
    student = config.student or _student_of(_run(config.init))
    sizes = config.size or targets.stores[0].spec.sizes[:1]
    check_student(student, sizes, views=config.batch_size // (config.num_workers * config.accumulate))
    target_sizes = [config.target_size or (nearest_size(store, sizes[0]),) for store in targets.stores]
    for corpus in corpora:
        for store, first, wanted in zip(corpus.stores, targets.stores, target_sizes, strict=True):
            _require_same_teacher(store, first)
            _require_sizes(store, wanted)
    mixes = parse_mix(config.mix, num_targets=len(config.targets))
    specs = _target_specs(config.layers, corpora, student=student, size=sizes[0], target_sizes=target_sizes)
    _require_tokens_for_relations(config, specs)
    decisive = {
        name: getattr(config, name)
        for name, option in options_of(TrainConfig).items()
        if not option.indifferent and not option.recorded_as
    }
    # resolved values, so that a default and the same value given explicitly are the same run
    decisive |= {
        "student": student,
        "size": sizes,
        "target_size": target_sizes,
        "weight": parse_weights(config.weight, specs),
        # None, because the specs of runs from before it have no such key and must still compare equal
        LAYERS: [[pair.name for pair in pairs_of(spec)] for spec in specs] if any(map(pairs_of, specs)) else None,
        "init": None if config.init is None else _digest(config.init),
        "pretrained": library_weights(student, sizes[0]).digest if is_pretrained(config) else None,
        "source": source_digest(student) if is_factory(student) else None,
    }
    method = begun_method(config.out)
    decisive |= encoder_schedule(config, specs, method)
    # method 1 had no such keys; without them the specs of its runs still compare equal
    if method > 1:
        decisive[METHOD] = method
        if config.relational is not None:
            decisive["relational_views"] = config.batch_size // (config.num_workers * config.accumulate)
        if config.photometric == "eupe":
            _require_plain_colours(corpora)
        if has_batch_norm(on_paper(student)):
            decisive["batch_norm_views"] = _batch_norm_views(config)
    return RunSpec(
        config=decisive,
        targets=specs,
        mix=tuple(
            {"share": mixed.share, "targets": tuple(target_spec(store) for store in corpus.stores)}
            for mixed, corpus in zip(mixes, corpora[1:], strict=True)
        ),
        pictures=tuple(hashlib.sha256("\0".join(corpus.keys).encode()).hexdigest() for corpus in corpora),
        total_steps=_total_steps(config, corpora, mixes),
        versions=library_versions(),
    )


def _target_specs(
    layers: Sequence[str],
    corpora: Sequence[TargetSet],
    *,
    student: str,
    size: int,
    target_sizes: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], ...]:
    """Return the targets' entries in the run spec, each with its pairs of layers if there are any.

    Raises: ConfigError as `chosen_pairs`; if mixed-in stores lack a layer.
    """
    stores = corpora[0].stores
    specs = [target_spec(store) for store in stores]
    names, firsts = target_names(specs), [sizes[0] for sizes in target_sizes]
    shapes = partial(encoder_layers, student, size)
    pairs = chosen_pairs(layers, stores, names, firsts, student=student, size=size, shapes=shapes)
    # only where there are pairs: specs without them are as they were before there were any
    specs = [{**spec, LAYERS: each} if each else spec for spec, each in zip(specs, pairs, strict=True)]
    for corpus in corpora[1:]:
        require_same_layers(corpus.stores, stores, specs)
    return tuple(specs)


def begun_method(run: Path) -> int:
    """Return the method version of the run in a folder; the newest one if there is no run.

    Raises: as `method_of`.
    """
    try:
        spec = read_run_spec(run)
    except RunError:
        return NEWEST_METHOD
    return method_of(spec)


def method_of(spec: RunSpec) -> int:
    """Return the method version that a run trains by.

    Raises: RunError if its spec names a version that is unknown here.
    """
    version = spec.config.get(METHOD, 1)
    if version not in range(1, NEWEST_METHOD + 1):
        raise RunError(
            f"{CONFIG_FILE} says {METHOD} {version!r}, but this eupe knows only 1 to {NEWEST_METHOD}; update eupe"
        )
    return int(version)


def holdout_by(method: int) -> HoldoutBy:
    """Return what decides which pictures are held out, under a method version."""
    return "content" if method > 1 else "key"


def encoder_schedule(
    config: TrainConfig, targets: Sequence[Mapping[str, Any]], method: int
) -> dict[str, float | str | None]:
    """Return the options that protect the encoder; None for each that treats the encoder as the heads.

    By default an encoder from weights is protected from heads that start from random weights: their first gradients
    are noise and would ruin it, and so would statistics of these views in batch norms whose weights hardly move.

    Args:
        targets: as in `RunSpec.targets`.
        method: the run's method version; methods 1 and 2 protect nothing by default.
    """
    from_weights = is_pretrained(config)
    if config.init is not None:
        from_weights = has_fresh_heads(config.init, targets, config.head_width)
    protected = method > 2 and from_weights
    frozen, mult, norms = config.freeze_encoder, config.encoder_lr_mult, config.batch_norms
    if frozen is None:
        frozen = FROZEN_SHARE if protected else 0.0
    if mult is None:
        mult = ENCODER_LR_MULT if protected else 1.0
    if norms is None:
        norms = FROZEN_NORMS if protected else RUNNING_NORMS
    # None, because the specs of runs from before these options have no such keys and must still compare equal
    plain = (frozen or None, None if mult == 1 else mult, None if norms == RUNNING_NORMS else norms)
    return dict(zip(PROTECTION, plain, strict=True))


def has_fresh_heads(init: Path, targets: Sequence[Mapping[str, Any]], head_width: int) -> bool:
    """Return whether a student that starts from `init` has a head that does not; see `init_from_run`.

    Args:
        init: a run or a weights file, which has no heads.
        targets: as in `RunSpec.targets`.
    """
    if not is_run(init):
        return True
    known = read_run_spec(init)
    sources = same_teachers(targets, known.targets)
    if known.config.get("head_width") != head_width or len(sources) < len(targets):
        return True
    return any(
        pairs_of(target) not in ([], pairs_of(known.targets[sources[i]]))
        or any(target[f"{kind}_dim"] not in (0, known.targets[sources[i]].get(f"{kind}_dim")) for kind in KINDS)
        for i, target in enumerate(targets)
    )


def same_teachers(targets: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return, for each target whose teacher a run knows, the run's target whose heads it takes.

    The n-th target of a teacher takes the run's n-th, or the run's last if it has fewer.

    Args:
        targets: of the new run, as in `RunSpec.targets`.
        known: those of the run to start from.
    """
    places: dict[str, list[int]] = {}
    for j, target in enumerate(known):
        places.setdefault(target["teacher"], []).append(j)
    teachers = [target["teacher"] for target in targets]
    return {
        i: places[teacher][min(teachers[:i].count(teacher), len(places[teacher]) - 1)]
        for i, teacher in enumerate(teachers)
        if teacher in places
    }


def frozen_steps(spec: RunSpec) -> int:
    """Return the number of steps, from the first, in which the encoder is not trained."""
    return round((spec.config.get("freeze_encoder") or 0.0) * spec.total_steps)


def encoder_lr_mult(spec: RunSpec) -> float:
    """Return the factor of the learning rate for the encoder."""
    return float(spec.config.get("encoder_lr_mult") or 1.0)


def _require_tokens_for_relations(config: TrainConfig, targets: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if a loss on relations has no target with the tokens that it compares."""
    for name, kind in RELATIONS.items():
        if getattr(config, name) is not None and not any(target[f"{kind}_dim"] for target in targets):
            raise ConfigError(f"--{name} compares {kind} tokens, but no target has any; leave it out")


def _require_plain_colours(corpora: Sequence[TargetSet]) -> None:
    """Raise ConfigError if views were recoloured in extraction: the student would see both changes."""
    for store in (store for corpus in corpora for store in corpus.stores):
        if store.spec.photometric:
            raise ConfigError(
                f"the views of {store.path} were already recoloured when they were extracted, and the student sees "
                "these colours; leave --photometric out of training"
            )


def _batch_norm_views(config: TrainConfig) -> int:
    """Return the number of views over which a batch norm of the student takes its mean.

    Raises: ConfigError if the workers' running statistics would differ.
    """
    if config.shard:
        raise ConfigError("with --shard each worker would keep its own running statistics of batch norms; leave it out")
    workers = 1 if config.sync_batch_norm else config.num_workers
    return config.batch_size // (workers * config.accumulate)


def nearest_size(store: Store, size: int) -> int:
    """Return the size of a store that is nearest to `size` px; the larger of two equally near ones."""
    return min(store.spec.sizes, key=lambda each: (abs(each - size), -each))


def is_pretrained(config: TrainConfig) -> bool:
    """Return whether a student starts from the weights of its library, or of the function that builds it.

    With `--init`, a tag only says which mean and deviation the weights were trained with. A run that was begun with a
    tag when a tag did not yet mean weights goes on as it began.
    """
    if config.init is not None or not (config.pretrained or has_tag(config.student)):
        return False
    with suppress(RunError):
        begun = read_run_spec(config.out).config
        return config.pretrained or begun.get("student") != config.student or begun.get("pretrained") is not None
    return True


def _student_of(run: Path) -> str:
    """Return the name of a run's student, which the run says, not the user.

    Raises: ConfigError for a function that is not trusted.
    """
    student = load_encoder_spec(run).arch
    require_trust(student, str(run))
    return student


def _require_same_teacher(store: Store, first: Store) -> None:
    """Raise ConfigError unless a mixed-in store has the teacher and tokens of the first corpus's store."""
    if store.spec.teacher != first.spec.teacher or store.spec.tokens != first.spec.tokens:
        raise ConfigError(
            f"--mix: {store.path} holds {'+'.join(store.spec.tokens)} of {store.spec.teacher['name']}, but the store "
            f"at the same position of --targets, {first.path}, holds {'+'.join(first.spec.tokens)} of "
            f"{first.spec.teacher['name']}, or the weights differ; give stores of the same teachers in the same order"
        )


def _require_sizes(store: Store, wanted: Sequence[int]) -> None:
    """Raise ConfigError if a store lacks one of the wanted sizes."""
    if lacking := set(wanted) - set(store.spec.sizes):
        raise ConfigError(
            f"{store.path} has no features at {', '.join(map(str, sorted(lacking)))} px, only at "
            f"{', '.join(map(str, store.spec.sizes))}; give another --target-size"
        )


def _total_steps(config: TrainConfig, corpora: Sequence[TargetSet], mixes: Sequence[MixedIn]) -> int:
    """Return the number of steps; an epoch is one pass over the first corpus.

    Raises: ConfigError if a corpus holds out no picture, or has fewer training views than a batch.
    """
    for corpus in corpora:
        num_train = len(corpus.training) * (corpus.num_views if config.views == "all" else 1)
        if not corpus.held_out.any():
            raise ConfigError(
                f"--holdout {config.holdout:g} holds out none of the {corpus.num_joined} pictures; give a larger share"
            )
        if config.batch_size > num_train:
            raise ConfigError(f"--batch-size {config.batch_size} exceeds the {num_train} training views")
    first = len(corpora[0].training) * (corpora[0].num_views if config.views == "all" else 1)
    # batches of mixed-in corpora come on top of those of the first corpus
    per_epoch = first // config.batch_size / (1 - sum(mixed.share for mixed in mixes))
    return config.steps or max(1, round((config.epochs or 1) * per_epoch))


def _run(init: Path | None) -> Path:
    """Return the run given with `--init`, whose architecture is used where no student is given.

    Raises: ConfigError if it is not a folder.
    """
    if init is None or not init.is_dir():
        raise ConfigError(f"--init {init} is not a training run, so give --student as well")
    return init


def _digest(init: Path) -> str:
    """Return the SHA-256 of the weights that a student starts from.

    Raises: ConfigError if they cannot be read.
    """
    # a run also brings its heads, so starting from it is not starting from its weights file
    digest = hashlib.sha256(b"run" if init.is_dir() else b"weights")
    try:
        for path in (init / WEIGHTS_FILE, init / HEADS_FILE) if init.is_dir() else (init,):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ConfigError(f"--init {init} is neither a finished training run nor a file of weights: {error}") from error
    return digest.hexdigest()


def target_spec(store: Store) -> dict[str, Any]:
    """Return a target's entry in the run spec."""
    teacher = store.spec.teacher
    return {
        "path": str(store.path),
        "fingerprint": store_fingerprint(store),
        "teacher": teacher["name"],
        "weights_sha256": teacher["weights_sha256"],
        "licence": teacher["licence"],
        "summary_dim": teacher["summary_dim"] if "summary" in store.spec.tokens else 0,
        "dense_dim": teacher["dense_dim"] if "dense" in store.spec.tokens else 0,
    }


def target_names(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one name per target of a spec: its teacher's, numbered if several targets share it."""
    names = [Path(target["teacher"]).name for target in targets]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def parse_weights(words: Sequence[str], targets: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the factor of each loss by `TARGET/KIND`.

    Args:
        words: `TARGET=W` or `TARGET/KIND=W`; later ones win.
    Raises: ConfigError if a word is malformed or names no target or kind, or if all factors are 0.
    """
    names = target_names(targets)
    weights = {
        f"{name}/{kind}": 1.0
        for name, target in zip(names, targets, strict=True)
        for kind in (*KINDS, LAYERS)
        if target.get(LAYERS if kind == LAYERS else f"{kind}_dim")
    }
    for word in words:
        name, _, number = word.rpartition("=")
        chosen = [known for known in weights if known == name or known.rpartition("/")[0] == name]
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not 0 <= factor < math.inf:
            raise ConfigError(f"--weight takes TARGET=W or TARGET/KIND=W with W at least 0, got {word!r}")
        if not chosen:
            known = ", ".join([*names, *weights])
            raise ConfigError(f"--weight {word!r} names no target{near(name, list(weights))}; the targets are {known}")
        weights.update(dict.fromkeys(chosen, factor))
    if not any(weights.values()):
        raise ConfigError("--weight sets every loss to 0; give at least one of them a weight above 0")
    return weights


def loss_weights(spec: RunSpec) -> list[dict[str, float]]:
    """Return, per target, the factor of each kind of token's loss."""
    weights: dict[str, float] = spec.config["weight"]
    return [
        {known.rpartition("/")[2]: w for known, w in weights.items() if known.rpartition("/")[0] == name}
        for name in target_names(spec.targets)
    ]


def store_fingerprint(store: Store) -> str:
    """Return the SHA-256 of what decides a store's content; its location and maker do not count."""
    return hashlib.sha256(json.dumps(store.spec.identity(), sort_keys=True).encode()).hexdigest()
