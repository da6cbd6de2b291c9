"""Students from outside timm: torchvision's, Transformers', and any module that a function of the user's own returns.

Each library is imported when one of its models is chosen, and not before. Whatever a model returns becomes a summary
and a map in one place, `tokens_of`. Shapes: B batch, C channels, N tokens, h w cells of the map, D width of a token.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.common.kinds import LOCAL_DIR, TRUST_VARIABLE, LayerShape, SummaryKind
from eupe.errors import ConfigError
from eupe.models.encoder_spec import EncoderSpec, near
from eupe.models.hub import at_revision, hub_or_offline, named, quiet_transformers

TORCHVISION, HF = "torchvision:", "hf:"
FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of RGB in [0, 1] for a model that does not say its own."""
MOST_PREFIX_TOKENS = 16
"""More tokens than this beside a square of patch tokens are no prefix, but another layout."""
OWN_SIDE = 224
"""Side in pixels at which the layers of a torchvision model are found, and of a model that does not say its own."""
TORCHVISION_HEADS = ("avgpool", "classifier", "fc", "head", "heads")
"""Layers of torchvision's classifiers that pool or classify."""
SAME = 1e-3
"""Largest difference between two passes that should agree, as a share of the output's deviation."""


def is_outside(student: str) -> bool:
    """Return whether a student's name is not timm's: `torchvision:NAME`, `hf:DIR_OR_REPO`, `PACKAGE.MODULE:FACTORY`."""
    return student.startswith((TORCHVISION, HF)) or is_factory(student)


def is_factory(student: str) -> bool:
    """Return whether a student's name is that of a function, which is code of the user's own."""
    return not student.startswith((TORCHVISION, HF, LOCAL_DIR)) and FACTORY.fullmatch(student) is not None


def require_trust(student: str, said_by: str) -> None:
    """Refuse to run a function that a file names rather than the user.

    Args:
        said_by: the file, for the message.
    Raises: ConfigError for a factory, unless `eupe --trust-factory` or its environment variable was given.
    """
    if is_factory(student) and os.environ.get(TRUST_VARIABLE) != "1":
        raise ConfigError(
            f"the student of {said_by} is built by {student}, which is code that would be run; if you trust it, give "
            f"`eupe --trust-factory ...`, or set {TRUST_VARIABLE}=1"
        )


def build_outside(student: str, size: int, known: EncoderSpec | None = None) -> nn.Module:
    """Build a student with its library's random initialisation, which draws from torch's global generator.

    Args:
        size: side of the square input, for models whose position tables depend on it.
        known: spec of an encoder that was built before; Transformers' models are built from the configuration in it.
    Raises: ConfigError if there is no such model or function, or it fails.
    """
    if student.startswith(TORCHVISION):
        return torchvision_model(student.removeprefix(TORCHVISION), size)
    if student.startswith(HF):
        return _hf(student, hf_config(student, known), size)
    return _made(student)


def origin_of(student: str, model: nn.Module) -> dict[str, Any]:
    """Return what says later whether a student is still built alike: its library's version, configuration or source."""
    if student.startswith(TORCHVISION):
        return {"library": "torchvision", "version": version("torchvision")}
    if student.startswith(HF):
        return {"library": "transformers", "version": version("transformers"), "config": model.config.to_dict()}  # type: ignore[operator,union-attr]
    module = student.split(":")[0]
    return {"library": module, "version": _version_of(module), "digest": source_digest(student)}


def outside_spec(student: str, model: nn.Module, size: int, known: EncoderSpec | None = None) -> EncoderSpec:
    """Return the spec of a student that is built, from passes over two random pictures.

    Args:
        known: spec of an encoder that was built before, which says mean and deviation of the input.
    Raises: ConfigError if it does not take the size, its output is neither a map nor tokens nor a summary and one of
        these, two passes of one picture differ, or the other pictures of a batch change a picture's output.
    """
    was_training = model.training
    model.eval()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            tokens, patch, prefix, kind = _looked_at(student, model, pixels)
            again, *_ = _looked_at(student, model, pixels)
            alone, *_ = _looked_at(student, model, pixels[:1])
            _require_stride(student, model, size, patch)
    finally:
        model.train(was_training)
    if not _alike(tokens, again):
        raise ConfigError(
            f"{student} gives two outputs for the same picture in evaluation mode (random layers, such as dropout that "
            "is always on); make them follow `self.training`"
        )
    if not _alike(Tokens(tokens.summary[:1], tokens.dense[:1]), alone):  # type: ignore[index]
        raise ConfigError(
            f"{student} gives a picture another output when it is alone than in a batch, in evaluation mode "
            "(statistics over the batch); use layers that do not mix pictures, or batch norms with running statistics"
        )
    mean, std = (known.mean, known.std) if known is not None else _normalisation(student, model)
    assert tokens.summary is not None
    return EncoderSpec(
        arch=student,
        size=size,
        patch=patch,
        dense_dim=tokens.dense.shape[-1],
        summary_dim=tokens.summary.shape[-1],
        prefix_tokens=prefix,
        summary=kind,
        dense="raw",
        mean=mean,
        std=std,
        origin=origin_of(student, model),
    )


def outside_tokens(model: nn.Module, pixels_BCHW: Tensor, spec: EncoderSpec, layers: Sequence[int] = ()) -> Tokens:
    """Return the tokens of normalised pixels.

    Args:
        layers: numbers of the layers whose maps are wanted as well; see `outside_layers`.
    Raises: ConfigError if the output is not laid out as the spec says.
    """
    output = _output(spec.arch, model, pixels_BCHW, layers=bool(layers))
    tokens = tokens_of(output, pixels_BCHW, patch=spec.patch, prefix=spec.prefix_tokens)
    if not layers:
        return tokens
    maps = _maps(output, pixels_BCHW, prefix=spec.prefix_tokens)
    return replace(tokens, layers={number: maps[number - 1] for number in layers})


def outside_layers(student: str, model: nn.Module, size: int) -> list[LayerShape]:
    """Return the shapes of the maps that a student gives besides its last one: several maps, or hidden states.

    Raises: ConfigError if it gives one map only, or its maps do not tile the input.
    """
    spec = outside_spec(student, model, size)
    pixels = torch.zeros(1, 3, size, size)
    model.eval()
    with torch.inference_mode():
        maps = _maps(_output(student, model, pixels, layers=True), pixels, prefix=spec.prefix_tokens)
    sides = [each.shape[1] for each in maps]
    if len(maps) < 2:
        raise ConfigError(f"{student} gives its last map only, no layers; a function may return a list of several maps")
    if any(size % side for side in sides):
        raise ConfigError(f"the maps of {student} have {sides} cells along a side, which do not tile {size} px")
    return [LayerShape(each.shape[-1], size // each.shape[1]) for each in maps]


def _maps(output: Any, pixels_BCHW: Tensor, *, prefix: int) -> list[Tensor]:
    """Return the maps [B, h, w, D] of a model's layers, first to last, as far as it returns them.

    Those of Transformers' models are its hidden states after each layer, as they are, without a final norm.
    """
    several: Sequence[Tensor] = ()
    if isinstance(output, Mapping):
        several = output.get("hidden_states") or ()
        several = several[1:]  # the first are the embeddings
    elif _is_pyramid(rest := _summary_and_rest(output)[1]):
        several = rest
    size = pixels_BCHW.shape[-1]
    maps = []
    for each in several:
        if each.ndim == 3:
            side = math.isqrt(each.shape[1] - prefix)
            maps.append(each[:, prefix:].reshape(each.shape[0], side, side, -1))
        elif each.shape[-1] == each.shape[-2] <= size:
            maps.append(each.permute(0, 2, 3, 1))
    return maps


def _is_pyramid(output: Any) -> bool:
    """Return whether a model returned several maps [B, D, h, w], none with more cells than the one before it."""
    if not isinstance(output, tuple | list) or len(output) < 2:
        return False
    if not all(isinstance(each, Tensor) and each.ndim == 4 for each in output):
        return False
    sides = [each.shape[-1] for each in output]
    return sides == sorted(sides, reverse=True)


def tokens_of(output: Any, pixels_BCHW: Tensor, *, patch: int, prefix: int) -> Tokens:
    """Return summary and map from what a model returned.

    Args:
        output: a map [B, D, h, w]; or tokens [B, prefix + h w, D], whose first one is the summary if there is a prefix;
            or several maps, the finest first, of which the last is taken; or a pair of a summary [B, Ds] and one of
            these. Without a summary, the mean of the map is taken.
        patch: pixels per cell, along either side.
    Raises: ConfigError for anything else.
    """
    summary, dense = _parts(output)
    h, w = (side // patch for side in pixels_BCHW.shape[-2:])
    if dense.ndim == 3 and dense.shape[1] == prefix + h * w:
        if summary is None and prefix:
            summary = dense[:, 0]
        dense_BhwD = dense[:, prefix:].reshape(dense.shape[0], h, w, -1)
    elif dense.ndim == 4 and tuple(dense.shape[-2:]) == (h, w):
        dense_BhwD = dense.permute(0, 2, 3, 1)
    else:
        raise ConfigError(
            f"the student gave {list(dense.shape)} for pictures of {list(pixels_BCHW.shape[-2:])} px, which is neither "
            f"a map of {h}x{w} cells nor {prefix} + {h * w} tokens"
        )
    return Tokens(summary=dense_BhwD.mean(dim=(1, 2)) if summary is None else summary, dense=dense_BhwD)


def _parts(output: Any) -> tuple[Tensor | None, Tensor]:
    """Return summary, if there is one, and map or tokens of what a model returned.

    Raises: ConfigError.
    """
    if isinstance(output, Mapping):
        maps = output.get("feature_maps")
        output = maps[-1] if maps else output.get("last_hidden_state", output)
    summary, output = _summary_and_rest(output)
    if _is_pyramid(output):
        output = output[-1]
    if isinstance(output, Tensor) and output.ndim in (3, 4) and output.is_floating_point():
        return summary, output
    raise ConfigError(
        f"the student returns {_described(output)}; give a map [B, D, h, w], several of them, the finest first, "
        "tokens [B, N, D], or a pair of a summary [B, D] and one of these"
    )


def _summary_and_rest(output: Any) -> tuple[Tensor | None, Any]:
    """Return the summary of a pair of a summary [B, D] and something else, and the other; None if it is no pair."""
    if isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[0], Tensor) and output[0].ndim == 2:
        return output[0], output[1]
    return None, output


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)} of {str(output.dtype).removeprefix('torch.')}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output))}"
    return f"a {type(output).__name__}"


def _output(student: str, model: nn.Module, pixels: Tensor, *, layers: bool = False) -> Any:
    if student.startswith(HF):
        options = {"interpolate_pos_encoding": True} if _interpolates(model) else {}
        return model(pixel_values=pixels, **options, **({"output_hidden_states": True} if layers else {}))
    output = model(pixels)
    return next(iter(output.values())) if student.startswith(TORCHVISION) else output


def _interpolates(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def _looked_at(student: str, model: nn.Module, pixels: Tensor) -> tuple[Tokens, int, int, SummaryKind]:
    """Return the tokens of pictures, the pixels per cell, the number of prefix tokens, and what the summary is.

    Raises: ConfigError if the model fails, or its output cannot be understood.
    """
    size = pixels.shape[-1]
    try:
        output = _output(student, model, pixels)
    except Exception as error:  # models refuse in many ways
        raise ConfigError(
            f"{student} does not take pictures of {size} px ({named(error)}); give another --size"
        ) from error
    try:
        summary, dense = _parts(output)
    except ConfigError as error:
        raise ConfigError(f"{student}: {error}") from error
    side, prefix = _square(student, dense, size)
    tokens = tokens_of(output, pixels, patch=size // side, prefix=prefix)
    kind: SummaryKind = "own" if summary is not None else "cls" if prefix else "mean"
    return tokens, size // side, prefix, kind


def _square(student: str, dense: Tensor, size: int) -> tuple[int, int]:
    """Return the cells along a side of the square that a model's output covers, and the number of its prefix tokens.

    Raises: ConfigError if there is no such square.
    """
    if dense.ndim == 4:
        h, w = dense.shape[-2:]
        if h == w and size % h == 0:
            return h, 0
        near_ones = "one that its stride divides" if h == w else "square pictures"
        raise ConfigError(
            f"{student} gives [{', '.join(map(str, dense.shape[1:]))}] for a picture of {size} px, which is not a map "
            f"[D, h, h] of whole cells; give a --size of {near_ones}, and channels first"
        )
    sides = [side for side in range(1, size + 1) if size % side == 0 and side**2 <= dense.shape[1]]
    side = max(sides)
    if (prefix := dense.shape[1] - side**2) > MOST_PREFIX_TOKENS:
        raise ConfigError(
            f"{student} gives {dense.shape[1]} tokens for a picture of {size} px, which are no square of patches with "
            f"at most {MOST_PREFIX_TOKENS} tokens ahead of it; give another --size"
        )
    return side, prefix


def _require_stride(student: str, model: nn.Module, size: int, patch: int) -> None:
    """Raise ConfigError if a picture of twice the size has other than twice the cells, so that they do not tile it.

    A model that takes no other size is taken as it is.
    """
    try:
        _, dense = _parts(_output(student, model, torch.zeros(1, 3, 2 * size, 2 * size)))
    except Exception:  # it may be laid out for one size
        return
    if dense.ndim == 4 and dense.shape[-1] != 2 * size // patch:
        raise ConfigError(
            f"{student} gives {size // patch} cells along {size} px and {dense.shape[-1]} along {2 * size} px, so its "
            "cells do not tile the picture; give a --size that its stride divides"
        )


def _alike(one: Tokens, other: Tokens) -> bool:
    pairs = [(one.dense, other.dense), (one.summary, other.summary)]
    return all(bool((a - b).abs().max() <= SAME * max(a.std().item(), 1e-6)) for a, b in pairs)  # type: ignore[operator,union-attr]


def _normalisation(student: str, model: nn.Module) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and deviation of a student's input: what its files or its attributes say, or else ImageNet's.

    Raises: ConfigError if it says something that is not three numbers.
    """
    said: Any = (getattr(model, "mean", None), getattr(model, "std", None))
    if student.startswith(HF):
        said = _processor(student.removeprefix(HF))
    if said[0] is None and said[1] is None:
        return IMAGENET
    try:
        (mean, std) = (tuple(float(number) for number in each) for each in said)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f"{student} says mean {said[0]} and std {said[1]}; give three numbers for each") from None
    return mean, std


# --- torchvision -----------------------------------------------------------------------------------------------------


def torchvision_model(name: str, size: int, weights: Any = None) -> nn.Module:
    """Build a torchvision classifier up to its last map or its tokens, under the library's own tensor names.

    Raises: ConfigError if there is no such classifier.
    """
    import torchvision.models
    from torchvision.models import get_model, list_models
    from torchvision.models.feature_extraction import create_feature_extractor

    known = list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"torchvision has no classifier {name!r}{near(name, known)}; see torchvision.models")
    with _quiet_torchvision():
        model = get_model(name, weights=weights, **_side(name, size))
        trunk: nn.Module = create_feature_extractor(model, [_last_map(name)])
    return trunk


@cache
def _last_map(name: str) -> str:
    """Return the last layer of a classifier that gives a map of more than one cell, or tokens, before it classifies."""
    from torchvision.models import get_model
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        model = get_model(name, weights=None, **_side(name, OWN_SIDE)).eval()
        in_training, names = get_graph_node_names(model)
        every = create_feature_extractor(model, train_return_nodes=in_training[-1:], eval_return_nodes=names)
        outputs = every.eval()(torch.zeros(1, 3, OWN_SIDE, OWN_SIDE))
    with_cells = [
        layer
        for layer, output in outputs.items()
        if isinstance(output, Tensor)
        and layer.split(".")[0] not in TORCHVISION_HEADS
        and (output.ndim == 3 or (output.ndim == 4 and output.shape[-2] == output.shape[-1] > 1))
    ]
    return str(with_cells[-1])


def _side(name: str, size: int) -> dict[str, int]:
    return {"image_size": size} if name.startswith("vit_") else {}


@contextmanager
def _quiet_torchvision() -> Iterator[None]:
    """Silence what the library says about its own layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- Transformers ----------------------------------------------------------------------------------------------------


def hf_config(student: str, known: EncoderSpec | None = None) -> Any:
    """Return the configuration of a model in a directory or on the hub, or that an earlier encoder was built from.

    The model's own code is never run.

    Raises: ConfigError if there is none.
    """
    from transformers import AutoConfig

    if known is not None and known.origin is not None:
        return AutoConfig.for_model(**known.origin["config"])
    place, revision = at_revision(student.removeprefix(HF))
    try:
        with quiet_transformers(), hub_or_offline(place):
            return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library refuses in many ways
        raise ConfigError(
            f"--student {student} has no configuration that Transformers reads ({named(error)})"
        ) from error


def _hf(student: str, config: Any, size: int) -> nn.Module:
    """Build a model of Transformers, laid out for the size if it cannot resample its positions to another one."""
    try:
        with quiet_transformers():
            kind = hf_class(config)
            model = kind.from_config(config, trust_remote_code=False)
            if getattr(config, "image_size", size) != size and not _takes(model, size):
                config.image_size = size
                model = kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # the library refuses in many ways
        raise ConfigError(f"{student} cannot be built by Transformers ({named(error)})") from error
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ConfigError(f"{student} does not take pictures alone: its input is {model.main_input_name}")
    built: nn.Module = model
    return built


def _takes(model: nn.Module, size: int) -> bool:
    """Return whether a model of Transformers takes pictures of a size that is not its configuration's."""
    try:
        with torch.inference_mode():
            _output(HF, model.eval(), torch.zeros(1, 3, size, size))
    except Exception:  # the library refuses in many ways
        return False
    finally:
        model.train()
    return True


def hf_class(config: Any) -> Any:
    """Return the class of Transformers that builds a configuration's model."""
    from transformers import AutoBackbone, AutoModel

    return AutoModel if type(config) in AutoModel._model_mapping else AutoBackbone


def _processor(place: str) -> tuple[Any, Any]:
    """Return mean and deviation that a directory's or a repository's image processor says; None where it says none."""
    from transformers.image_processing_base import ImageProcessingMixin

    name, revision = at_revision(place)
    try:
        with quiet_transformers(), hub_or_offline(name):
            said, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    except Exception:  # there may be none
        return None, None
    return said.get("image_mean"), said.get("image_std")


# --- a function of the user's own ------------------------------------------------------------------------------------


def _function(student: str) -> Callable[[], Any]:
    """Return the function that a student's name means.

    Raises: ConfigError if the module cannot be imported, or has no such function.
    """
    module, _, name = student.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the module is the user's
        raise ConfigError(
            f"--student {student}: the module {module} cannot be imported ({named(error)}); "
            "install its package, or add its folder to PYTHONPATH"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = [each for each in dir(found) if not each.startswith("_")]
            raise ConfigError(f"--student {student}: {module} has no {name!r}{near(name, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"--student {student}: {name} is no function, but a {type(found).__name__}")
    function: Callable[[], Any] = found
    return function


def _made(student: str) -> nn.Module:
    function = _function(student)
    try:
        model = function()
    except Exception as error:  # the function is the user's
        raise ConfigError(
            f"--student {student} failed ({named(error)}); it must return a torch.nn.Module "
            "when it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--student {student} returned {_described(model)}, not a torch.nn.Module")
    return model


def _version_of(module: str) -> str | None:
    """Return the version of the package that a module belongs to; None if it is not installed as one."""
    top = module.split(".")[0]
    try:
        return version(packages_distributions().get(top, [top])[0])
    except PackageNotFoundError:
        return None


def source_digest(student: str) -> str | None:
    """Return the sha256 of the file that defines a function; None for one without a file."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(_function(student)))
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None
