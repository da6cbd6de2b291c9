"""Mean and std of pixels from a model's own files, read as its library reads them.

A file of the user's overrides the table entry of the architecture: timm's `config.json`, transformers'
`processor_config.json` and `preprocessor_config.json`, open_clip's `open_clip_config.json`, a run's `student.json`.
Settings for resizing and cropping are ignored: the view decides these for all teachers alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eupe.common.kinds import STUDENT_FILE
from eupe.common.reading import read_json
from eupe.errors import RunError, TeacherError
from eupe.models.hub import at_revision, brief, hub_or_offline, quiet_transformers
from eupe.teachers.spec import TeacherSpec

Triple = tuple[float, float, float]

UNIT: tuple[Triple, Triple] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Mean and std that leave pixels in [0, 1]."""
LEVELS = 255
PROBE_SIZE = 32
TOLERANCE = 1e-4
"""Largest difference between the library's output for a probe and ours, relative to the range of ours (at least 1)."""

TIMM_FILE, OPEN_CLIP_FILE = "config.json", "open_clip_config.json"
NESTED_FILE, PROCESSOR_FILE = "processor_config.json", "preprocessor_config.json"
"""Files of transformers; the first is read instead of the second if it has an image processor inside."""
VIDEO_FILE = "video_preprocessor_config.json"
"""The file of a model of videos, which has no image processor."""
OWN_FILES = (TIMM_FILE, OPEN_CLIP_FILE, STUDENT_FILE, NESTED_FILE, PROCESSOR_FILE, VIDEO_FILE)
"""All files beside a model's weights that are read."""
HARMLESS_ARGS = {"img_size", "global_pool", "dynamic_img_size", "strict_img_size", "num_classes", "in_chans"}
"""timm's model_args that need no check here: the weights' names and shapes show it if one of them is wrong."""


@dataclass(frozen=True)
class Normalisation:
    """A mean and std per channel: pixels in [0, 1] become (pixels - mean) / std."""

    mean: Triple
    std: Triple
    file: str
    """Name of the file that they come from."""


def as_given(spec: TeacherSpec, weights: Path | None) -> TeacherSpec:
    """Return the teacher with mean and std from a file beside its local weights, and a note if they change.

    Raises: TeacherError if the file cannot be read, describes another model, or asks for anything but a mean and std
        for each channel.
    """
    if weights is None or not weights.exists():
        return spec
    found = normalisation_beside(spec, weights)
    if found is None or (found.mean, found.std) == (spec.mean, spec.std):
        return spec
    said = f"mean and std are those of {found.file} beside the weights, not {_plain(spec.mean)} and {_plain(spec.std)}"
    return dataclasses.replace(spec, mean=found.mean, std=found.std, note="; ".join(filter(None, (spec.note, said))))


def where_from(spec: TeacherSpec, weights: Path | None) -> str:
    """Return the source of a teacher's mean and std in words: a file or a table.

    Raises: TeacherError as `as_given` does.
    """
    if weights is not None and weights.exists() and (found := normalisation_beside(spec, weights)) is not None:
        return str((weights if weights.is_dir() else weights.parent) / found.file)
    if spec.is_local_dir or spec.backend == "run":
        return str(spec.place / (TIMM_FILE if spec.is_local_dir else STUDENT_FILE))
    if not spec.name.startswith(f"{spec.backend}:"):
        return "the table of teachers"
    if spec.hub_repository:
        return f"{spec.hub_repository}/{TIMM_FILE}"
    if spec.backend != "hf":
        return f"{spec.backend}'s table of weights"
    if is_model(spec.place, "radio") or (found := of_processor(spec.model)) is None:
        return "what is usual for its kind"
    return f"{spec.model.rstrip('/')}/{found.file}"


def normalisation_beside(spec: TeacherSpec, weights: Path) -> Normalisation | None:
    """Return the normalisation from the files in a directory of weights, or beside a weights file; None without any.

    If several libraries have files there, those of the teacher's own library count.

    Raises: TeacherError as `as_given` does.
    """
    folder = weights if weights.is_dir() else weights.parent
    if spec.backend == "hf" and is_model(folder, "radio"):
        return None  # the model normalises inside
    for kind in sorted(_READERS, key=lambda kind: kind != spec.backend):  # own library first: False sorts before True
        if (found := _READERS[kind](spec, folder)) is not None:
            return found
    return None


def of_processor(source: str) -> Normalisation | None:
    """Return how transformers' `AutoImageProcessor` normalises a picture; None if the repository has no processor.

    Raises: TeacherError if a file is not JSON, or the library cannot read it or applies anything but a mean and std for
        each channel.
    """
    settings, name = processor_settings(source)
    if settings is None:
        return None
    where = f"{source.rstrip('/')}/{name}"
    try:
        processor = open_processor(source)
    except Exception as error:
        if (plain := _plainly_said(settings, name)) is not None:
            return plain  # for example with a processor class of the repository's own
        raise TeacherError(
            f"{where} cannot be read by transformers' AutoImageProcessor ({brief(error)}); set "
            "image_processor_type to one of the library's, or image_mean and image_std to three numbers each"
        ) from error
    return _checked(_attributes(processor, where, name), lambda probe: processed(processor, probe), where)


def processor_settings(source: str) -> tuple[dict[str, Any] | None, str]:
    """Return the image processor settings of a directory or repository (None without any), and their file name.

    Raises: TeacherError if a file is not a JSON object, or has the settings where the library does not look.
    """
    nested = _cached_json(source, NESTED_FILE) or {}
    if isinstance(nested.get("image_processor"), Mapping):
        return dict(nested["image_processor"]), NESTED_FILE
    if (settings := _cached_json(source, PROCESSOR_FILE)) is not None:
        return settings, PROCESSOR_FILE
    hidden = [name for name, value in nested.items() if isinstance(value, Mapping) and "image_mean" in value]
    if hidden:
        raise TeacherError(
            f"{source.rstrip('/')}/{NESTED_FILE} has image_mean under {hidden[0]!r}, where transformers' "
            f"AutoImageProcessor does not look; put these settings into a {PROCESSOR_FILE}"
        )
    return _cached_json(source, VIDEO_FILE), VIDEO_FILE


def open_processor(source: str) -> Any:
    """Open the library's own processor of pictures, or of videos if there is no other; raise whatever it raises."""
    from transformers import AutoImageProcessor, AutoVideoProcessor

    kind = AutoVideoProcessor if processor_settings(source)[1] == VIDEO_FILE else AutoImageProcessor
    with quiet_transformers(), hub_or_offline(source):
        name, revision = at_revision(source)
        return kind.from_pretrained(name, revision=revision, trust_remote_code=False)


def processed(processor: Any, views_u8_BHWC: Any) -> Any:
    """Return the library processor's output for views that already have the right size: float array [B, 3, H, W]."""
    alone = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_last"}
    with quiet_transformers():
        if "videos" in processor.model_input_names[0]:
            one_frame_each = [view[None] for view in views_u8_BHWC]
            made = processor(videos=one_frame_each, do_sample_frames=False, return_tensors="pt", **alone)
            return np.asarray(made["pixel_values_videos"][:, 0])
        made = processor(images=list(views_u8_BHWC), do_pad=False, return_tensors="np", **alone)
    return np.asarray(made["pixel_values"])


def is_model(folder: Path, model_type: str) -> bool:
    """Return whether a directory's config.json names this model type of transformers."""
    return _json(folder / TIMM_FILE).get("model_type") == model_type


def timm_folder(folder: Path) -> bool:
    """Return whether a directory has a config.json as timm writes it."""
    plain = _json(folder / TIMM_FILE)
    return "architecture" in plain and ("pretrained_cfg" in plain or "model_type" not in plain)


def _of_timm(spec: TeacherSpec, folder: Path) -> Normalisation | None:
    """Read the normalisation of a timm folder; None if it is not one.

    Raises: TeacherError if timm cannot read the file, or it describes another architecture than a timm teacher's.
    """
    if not timm_folder(folder):
        return None
    from timm.data import resolve_data_config
    from timm.models._builder import resolve_pretrained_cfg
    from timm.models._hub import load_model_config_from_path

    file = folder / TIMM_FILE
    try:
        own, arch, args = load_model_config_from_path(folder)
        resolved = resolve_data_config(pretrained_cfg=resolve_pretrained_cfg(arch, own).to_dict())
    except Exception as error:
        raise TeacherError(f"timm cannot read {file} ({type(error).__name__}: {brief(error)})") from error
    if spec.backend == "timm" and spec.architecture is not None:
        _check_architecture(spec, arch, args, file)
    return Normalisation(*_triples(resolved["mean"], resolved["std"], file), TIMM_FILE)


def _check_architecture(spec: TeacherSpec, arch: str, args: Mapping[str, Any], file: Path) -> None:
    """Raise TeacherError if a timm folder holds another architecture, or one built with other arguments."""
    from eupe.models.proxy import in_stock_timm

    wanted, own_args = in_stock_timm(str(spec.architecture))
    odd = {name: value for name, value in args.items() if name not in HARMLESS_ARGS and own_args.get(name) != value}
    if arch not in (wanted, spec.architecture) or odd:
        found = f"{arch} with {', '.join(f'{k}={v}' for k, v in odd.items())}" if odd else arch
        raise TeacherError(
            f"{file} says that the weights next to it are of {found}, but the teacher {spec.name} is "
            f"{spec.architecture}; give --teacher timm:local-dir:{file.parent}, or keep the weights of different "
            "models in separate folders"
        )


def _of_open_clip(spec: TeacherSpec, folder: Path) -> Normalisation | None:
    """Read the normalisation of an open_clip folder; None if it is not one.

    Raises: TeacherError if open_clip cannot read the file, or it describes another model than an open_clip teacher's.
    """
    file = folder / OPEN_CLIP_FILE
    plain = _json(file)
    if not plain:
        return None
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if not isinstance(plain.get("model_cfg"), Mapping):
        raise TeacherError(f"{file} has no model_cfg, so open_clip cannot read it; write it in open_clip's format")
    if spec.backend == "open_clip":
        _check_model_cfg(spec, plain["model_cfg"], open_clip.get_model_config(spec.architecture), file)
    merged = merge_preprocess_dict(PreprocessCfg(), plain.get("preprocess_cfg") or {})
    return Normalisation(*_triples(merged["mean"], merged["std"], file), OPEN_CLIP_FILE)


def _check_model_cfg(spec: TeacherSpec, found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    """Raise TeacherError if the model computes differently in a way that the weights' shapes do not show."""
    pairs: dict[str, tuple[Any, Any]] = {}
    pairs["quick_gelu"] = (bool(found.get("quick_gelu")), bool(wanted.get("quick_gelu")))
    theirs, ours = found.get("vision_cfg") or {}, wanted["vision_cfg"]
    for name in ("act_kwargs", "norm_kwargs", "pool_type", "final_ln_after_pool", "no_ln_pre"):
        pairs[name] = (theirs.get(name) or None, ours.get(name) or None)
    if different := [f"{name} {got} instead of {want}" for name, (got, want) in pairs.items() if got != want]:
        raise TeacherError(
            f"{file} describes a different model than {spec.name}: {', '.join(different)}; give the teacher that has "
            "this architecture, or keep the weights of different models in separate folders"
        )


def _of_transformers(spec: TeacherSpec, folder: Path) -> Normalisation | None:
    if is_model(folder, "radio") or "_radio_" in (spec.architecture or ""):
        return None  # the library's model normalises inside, and its processor does not say so
    return of_processor(str(folder))


def _of_run(spec: TeacherSpec, folder: Path) -> Normalisation | None:
    if not (folder / STUDENT_FILE).is_file():
        return None
    from eupe.models.encoder_spec import load_encoder_spec

    try:
        encoder = load_encoder_spec(folder)
    except RunError as error:
        raise TeacherError(str(error)) from error
    return Normalisation(encoder.mean, encoder.std, STUDENT_FILE)


_READERS: dict[str, Callable[[TeacherSpec, Path], Normalisation | None]] = {
    "timm": _of_timm,
    "open_clip": _of_open_clip,
    "hf": _of_transformers,
    "run": _of_run,
}


def _attributes(processor: Any, where: str, name: str) -> Normalisation:
    """Return a processor's mean and std, in units of pixels in [0, 1], from its attributes.

    The processor scales by a factor, then subtracts a mean and divides by a std.

    Raises: TeacherError if it has no such attributes.
    """
    if hasattr(processor, "data_config"):  # timm's, wrapped
        return Normalisation(*_triples(processor.data_config["mean"], processor.data_config["std"], where), name)
    factor = processor.rescale_factor if getattr(processor, "do_rescale", False) else 1
    if not getattr(processor, "do_normalize", False):
        mean, std = UNIT
        return Normalisation(mean, std if _is_unit(factor) else _times(std, 1 / (LEVELS * factor)), name)
    mean, std = _triples(getattr(processor, "image_mean", None), getattr(processor, "image_std", None), where)
    if not _is_unit(factor):
        mean, std = _times(mean, 1 / (LEVELS * factor)), _times(std, 1 / (LEVELS * factor))
    return Normalisation(mean, std, name)


def _is_unit(factor: float) -> bool:
    return abs(LEVELS * factor - 1) < 1e-9


def _times(values: Triple, factor: float) -> Triple:
    first, second, third = (value * factor for value in values)
    return first, second, third


def _checked(found: Normalisation, library: Callable[[Any], Any], where: str) -> Normalisation:
    """Return what was found if the library normalises a small random picture in the same way.

    Raises: TeacherError if it does not, or refuses the picture.
    """
    probe = np.random.default_rng(0).integers(0, LEVELS + 1, (1, PROBE_SIZE, PROBE_SIZE, 3), dtype=np.uint8)
    ours = ((probe / LEVELS - np.array(found.mean)) / np.array(found.std)).transpose(0, 3, 1, 2)
    try:
        theirs = np.asarray(library(probe))
    except Exception as error:
        raise TeacherError(
            f"transformers rejects a picture with the settings in {where} ({brief(error)}); correct these settings"
        ) from error
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=0, atol=TOLERANCE * max(1.0, np.ptp(ours))):
        raise TeacherError(
            f"{where} does more to pictures than subtract a mean and divide by a std per RGB channel, which is all "
            "that eupe does; eupe cannot extract features of this model with it"
        )
    return found


def _triples(mean: Any, std: Any, where: object) -> tuple[Triple, Triple]:
    """Return mean and std as three numbers each, from one or three.

    Raises: TeacherError for anything else, and for a std that is not above 0.
    """
    made = []
    for name, value in (("mean", mean), ("std", std)):
        values = tuple(value) if isinstance(value, list | tuple | np.ndarray) else (value,)
        values = values * 3 if len(values) == 1 else values
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values)
        if len(values) != 3 or not numbers or (name == "std" and min(values) <= 0):
            raise TeacherError(
                f"{where} has {name} {value!r}; expected one number, or three for red, green and blue (a std must be "
                "above 0)"
            )
        made.append(values)
    return made[0], made[1]


def _plainly_said(settings: Mapping[str, Any], name: str) -> Normalisation | None:
    """Return mean and std if the settings state both and nothing else in them changes values; else None."""
    if settings.get("do_normalize") is False or settings.get("do_rescale") is False:
        return None
    if not _is_unit(settings.get("rescale_factor", 1 / LEVELS)):
        return None
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list)):
        return None
    return Normalisation(*_triples(mean, std, name), name)


def _cached_json(source: str, name: str) -> dict[str, Any] | None:
    """Read a JSON file of a directory or repository; None if there is no such file.

    Raises: TeacherError if it is not a JSON object.
    """
    from transformers.utils import cached_file

    repository, revision = at_revision(source)
    with hub_or_offline(source):
        file = cached_file(
            repository,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if file is None else _json(Path(file))


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON file; an empty dict if there is no such file.

    Raises: TeacherError if it is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        plain = read_json(file)
    except (OSError, ValueError) as error:
        raise TeacherError(f"{file} cannot be read as JSON ({brief(error)})") from error
    if not isinstance(plain, dict):
        raise TeacherError(f"{file} is not a JSON object")
    return plain


def _plain(values: Triple) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
