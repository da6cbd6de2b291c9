"""Repositories in timm's layout on the hub, `hf-hub:OWNER/NAME[@REVISION]`, by other authors than timm's.

Architecture and arguments are in a repository's config.json. JSON cannot name a Python class, so for some models the
kind of layer stands on the model card only; `CARDS` has these.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from eupe.errors import TeacherError
from eupe.models.hub import at_revision, brief, hub_or_offline
from eupe.teachers.preprocess import timm_folder
from eupe.teachers.spec import TeacherSpec

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names that timm looks for, in this order."""
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
"""Without `act_layer`, the gate would be a GELU: the block's own activation replaces that of the packed SwiGLU."""

CARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "MahmoodLab/UNI2-h": (
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "init_values": 1e-5,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **SWIGLU,
        },
    ),
    "paige-ai/Virchow2": (
        "vit_huge_patch14_224",
        {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, **SWIGLU},
    ),
    "bioptimus/H-optimus-0": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}),
    "bioptimus/H-optimus-1": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}),
}
"""timm's architecture, and the arguments of timm's `create_model`, by repository, as the model cards give them."""


def card(spec: TeacherSpec) -> tuple[str, dict[str, Any]] | None:
    """Return architecture and arguments of a model on the hub whose model card is known; None for all others."""
    if spec.hub_repository is None or (known := CARDS.get(spec.hub_repository.partition("@")[0])) is None:
        return None
    arch, options = known
    return arch, {name: _layer(value) if name == "mlp_layer" else value for name, value in options.items()}


def fetch(repository: str, *, weights: bool) -> Path:
    """Return the folder of the hub's cache that holds a repository's config.json, and its weights if asked for.

    Raises: TeacherError if the repository is not in timm's layout, or has no weights; for a hub that does not answer
        or refuses, and for files that are not in the cache, whatever the hub's client raises.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name, revision = at_revision(repository)
    with hub_or_offline(repository):
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        if not timm_folder(folder):
            raise TeacherError(
                f"the config.json of {repository} names no architecture of timm's; for a model of transformers, give "
                f"hf:{repository}"
            )
        for file in WEIGHTS if weights else ():
            try:
                return Path(hf_hub_download(name, file, revision=revision)).parent
            except EntryNotFoundError as error:
                missing = error
    if weights:
        raise TeacherError(
            f"{repository} has neither {' nor '.join(WEIGHTS)} ({brief(missing)}); give its weights with --weights"
        ) from missing
    return folder


def require_as_on_card(spec: TeacherSpec, folder: Path, *, pixels: bool) -> None:
    """Compare a repository's config.json with its model card, where the card is known.

    Args:
        pixels: whether the file's mean and std must be those of the spec, too.
    Raises: TeacherError if they contradict each other, because then one of them belongs to another model.
    """
    from timm.models._hub import load_model_config_from_path

    if (known := card(spec)) is None:
        return
    own, arch, options = load_model_config_from_path(folder)
    said = {"architecture": arch, **options, **({key: own.get(key) for key in ("mean", "std")} if pixels else {})}
    wanted: dict[str, Any] = {"architecture": known[0], **known[1], "mean": spec.mean, "std": spec.std}
    odd = [
        f"{name} {value!r} instead of {wanted[name]!r}"
        for name, value in said.items()
        if value is not None and name in wanted and not _same(value, wanted[name])
    ]
    if odd:
        raise TeacherError(
            f"{folder / 'config.json'} describes another model than {spec.name}: {', '.join(odd)}; give "
            f"--teacher timm:local-dir:{folder} to go by this file alone"
        )


def _layer(name: str) -> Any:
    import timm.layers

    return getattr(timm.layers, name)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other)
    if isinstance(one, list | tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(math.isclose(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
