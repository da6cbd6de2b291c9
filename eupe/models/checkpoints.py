"""Reading of trainers' weights files: a model's tensors are found inside wrappers, without running a pickle's code.

A checkpoint is read as one flat table of tensors. Tensors in a nested dict get the dict's key as a prefix, so that
`{"teacher": {"backbone.norm.weight": ...}}` and `{"teacher.backbone.norm.weight": ...}` are the same.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from eupe.errors import RunError, TeacherError

DIRECTORY_PATTERNS = (
    "model.safetensors",
    "model-*.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "*.pt",
    "*.pth",
    "*.bin",
    "*.ckpt",
)
"""Name patterns of a directory's weights: the first that any file matches, and then every file that matches it."""

TORCH_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
"""Parts that torch's own wrappers put into names; no library's model has such names."""
WRAPPERS = {"module", "model", "net", "network", "backbone", "encoder", "student", "teacher", "ema"}
"""Prefixes that trainers put before all of a model's names; not `visual`, by which libraries recognise their own."""
NOT_A_MODEL = re.compile(
    r"(optim\w*|(lr_)?sched\w*|(\w+_)?scaler|amp|\w*loss\w*|criterion|\w*rng\w*|hyper_param\w*|config|cfg|args|callbacks)",
    re.I,
)
"""Keys of a checkpoint that also hold tensors, but never those of a model."""
LEAST_COVER = 0.5
"""Share of a model's tensors, by name and shape, that a part of a checkpoint must hold to count as its weights."""
NEARLY = 0.9
"""Share of the best place's tensors above which another place counts as equally likely."""
LEAST_SHARE = 0.1
"""Share of the largest table's number of tensors above which another table could also be a model's."""
ADAPTER_FILE = "adapter_config.json"
ADAPTER_NAME = re.compile(r"(^|\.)(lora_\w+|ia3_\w+|oft_\w+|hada_\w+)(\.|$)")
"""Parts of the names of tensors that adapter libraries create."""
MERGE = (
    "merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(NEW), then give NEW, "
    "or move it out of the folder to use the model without it"
)
ALONE = "save the one that you mean in a separate file"
_HEADS = {
    b"version https://git-lfs": "is a git-LFS pointer, not the weights it stands for; fetch them with `git lfs pull`",
    b"<!doctype": "is a web page, not weights; download the file itself",
    b"<html": "is a web page, not weights; download the file itself",
    b"<?xml": "is a server's answer, not weights; download the file itself",
    b"{": "is a JSON document, not weights; give the file of tensors",
    b"gguf": "is a GGUF file; give the weights as safetensors or as torch.save writes them",
}


def read_checkpoint(
    path: Path,
    *,
    key: str | None = None,
    fitting: Mapping[str, Any] | None = None,
    whole: bool = False,
    partly: bool = False,
    remedy: str = "choose one with --weights-key",
) -> dict[str, Tensor]:
    """Read the tensors of one model from a weights file, or from all weights files of one format in a directory.

    Args:
        key: place of the tensors in the file: a key, or a prefix of their names; found automatically if only one place
            is possible.
        fitting: tensors or shapes, by name, of the model to be loaded, by which the place is found.
        whole: accept only a place with all of them; otherwise, if none has all, a place with all of the names and most
            of the shapes will do.
        partly: some of the names may be missing.
        remedy: advice in the error message about several places.
    Raises: TeacherError if there is nothing, it is not a checkpoint, or several places are possible.
    """
    tables = read_tables(path)
    if key is not None:
        tables = _under(tables, key, path)
    if fitting:
        flat = _flat(tables)
        places = _fitting_places(flat, fitting, whole=whole, partly=partly)
        if "" in places:
            return tables.get("", flat)
        if len(places) > 1:
            raise TeacherError(_several(path, places, remedy))
        if places:
            return _stripped(flat, places[0])
    most = max(map(len, tables.values()))
    models = {place: table for place, table in tables.items() if len(table) > most * LEAST_SHARE}
    if len(models) > 1:
        raise TeacherError(_several(path, list(models), remedy))
    return _without_wrappers(next(iter(models.values())))


def read_tables(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read every table of named tensors in a weights file or directory, by its key ("" for the file itself).

    Raises: TeacherError if there is none, an adapter is among them, or two files have the same tensors.
    """
    merged: dict[str, dict[str, Tensor]] = {}
    origin: dict[tuple[str, str], Path] = {}
    for file in found_files(path):
        found = _read_file(file)
        _require_merged(file, found)
        for place, part in found.items():
            if twice := next((name for name in part if (place, name) in origin), None):
                raise TeacherError(
                    f"{path} holds several checkpoints: {origin[place, twice].name} and {file.name} have the same "
                    f"tensors ({twice}); give the one that you mean"
                )
            origin |= dict.fromkeys(((place, name) for name in part), file)
            merged.setdefault(place, {}).update(part)
    return merged


def is_usual(path: Path, key: str) -> bool:
    """Return whether a key names the tensors that are read without a key, so that it adds nothing.

    These are the only table of the file, or what versions of eupe without keys read: "state_dict", then "model", one
    inside the other.

    Raises: TeacherError if the file cannot be read.
    """
    wanted = TORCH_WRAPPERS.sub("", key).strip(".")
    if path.is_dir() or is_safetensors(path):
        return False
    loaded, place = _load(path, mapped=True), list[str]()
    tables = [found for found, _ in _tables(loaded, ())]
    for name in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            place.append(name)
    return wanted == ".".join(place) or tables == [wanted]


def require_no_adapter(folder: Path) -> None:
    """Raise TeacherError if a directory holds an adapter (LoRA and the like), alone or beside the model it changes.

    transformers would apply it or not, depending on whether peft is installed.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise TeacherError(
            f"{folder} holds an adapter ({ADAPTER_FILE}), which is not part of the model's weights; {MERGE}"
        )


def found_files(path: Path) -> list[Path]:
    """Return the weights files at a path.

    Raises: TeacherError if there are none, or if an adapter, which would be ignored, is beside them.
    """
    if not path.exists():
        _, equals, after = str(path).partition("=")
        hint = f"; this verb takes the path alone, without TEACHER=: --weights {after}" if equals else ""
        raise TeacherError(f"weights {path} do not exist{hint}")
    require_no_adapter(path)
    if not (files := weights_files(path)):
        raise TeacherError(f"{path} holds no weights: no {', '.join(DIRECTORY_PATTERNS)} in it")
    return files


def weights_files(path: Path) -> list[Path]:
    """Return a file itself, or a directory's files that hold its model by the hub's naming habits, sorted by name."""
    if path.is_file():
        return [path]
    found = (sorted(path.glob(pattern)) for pattern in DIRECTORY_PATTERNS)
    return next((files for files in found if files), [])


def require_readable(path: Path) -> None:
    """Raise TeacherError, without reading any tensors, if there are no weights, or files of another kind."""
    for file in found_files(path):
        _require_weights_file(file)


def is_safetensors(file: Path) -> bool:
    """Return whether a file begins as safetensors does, whatever its name."""
    with file.open("rb") as stream:
        start = stream.read(9)
    # 8 bytes with the header's length, then the header, which is JSON.
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 28


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a run.

    Raises: RunError if it is missing, or not safetensors.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} cannot be read as a safetensors file ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file notes beside its tensors.

    Raises: OSError, SafetensorError.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _require_weights_file(file: Path) -> None:
    """Raise TeacherError if a file is not weights; say what it is instead, as far as its first and last bytes show."""
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
        if is_safetensors(file):
            with safetensors.safe_open(file, framework="pt"):
                return
    except Exception as error:
        raise TeacherError(_unreadable(file, error)) from error
    if not start:
        raise TeacherError(f"{file} is empty; download it again")
    for head, said in _HEADS.items():
        if start.lstrip().lower().startswith(head):
            raise TeacherError(f"{file} {said}")
    if start[:2] != b"PK" and start[:1] != b"\x80":  # torch.save's zip archive, or the pickle that it was before 1.6
        raise TeacherError(f"{file} is not a weights file: neither safetensors nor written by torch.save")


def _read_file(file: Path) -> dict[str, dict[str, Tensor]]:
    _require_weights_file(file)
    try:
        if is_safetensors(file):
            return {"": _renamed(safetensors.torch.load_file(file))}
    except Exception as error:
        raise TeacherError(_unreadable(file, error)) from error
    tables = dict(_tables(_load(file), ()))
    if not tables:
        raise TeacherError(f"{file} is not a state dict: it does not hold named tensors")
    return tables


def _require_merged(file: Path, tables: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise TeacherError if an adapter's tensors are in a file's tables."""
    if name := next((name for table in tables.values() for name in table if ADAPTER_NAME.search(name)), None):
        raise TeacherError(f"{file} holds an adapter's tensors ({name}), not a model's own; {MERGE}")


def _load(file: Path, *, mapped: bool = False) -> Any:
    """Load a file with torch's weights-only unpickler.

    Args:
        mapped: leave the tensors on disk, for callers that need only names.
    """
    try:
        if mapped:
            with suppress(RuntimeError, ValueError):  # files of torch before 1.6 cannot be memory-mapped
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with file.open("rb") as stream:  # a stream: given a path, torch goes by its ending
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TeacherError(_unreadable(file, error)) from error


def _unreadable(file: Path, error: Exception) -> str:
    words = " ".join(str(error).split())
    if objects := _objects(file, words):
        return (
            f"{file} holds Python objects as well as tensors ({', '.join(objects)}), and unpickling them could run "
            "any code; if you trust the file, save only its tensors: torch.save(torch.load(OLD, "
            "weights_only=False)['model'], NEW), with the file's own key"
        )
    if "TorchScript" in words:
        return f"{file} is a TorchScript program; save its tensors: torch.save(torch.jit.load(OLD).state_dict(), NEW)"
    short = words if len(words) <= 200 else f"{words[:200]}..."
    cut = re.search(
        r"incomplete|not fully covered|central directory|EOF|Ran out of input|truncated|corrupt", words, re.I
    )
    hint = "; it is cut short or damaged: download or save it again" if cut or not words else ""
    return f"{file} cannot be read as a weights file ({short or type(error).__name__}){hint}"


def _objects(file: Path, words: str) -> list[str]:
    """Return the names of the classes for which torch refused a pickle."""
    if "weights_only" not in words and "Weights only" not in words:
        return []
    with suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))[:3]
    return re.findall(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", words)[:1]


def _tables(loaded: Any, place: tuple[str, ...]) -> list[tuple[str, dict[str, Tensor]]]:
    """Collect, depth first, every dict that holds tensors by name; skip top-level keys that never hold a model."""
    if not isinstance(loaded, Mapping):
        return []
    own = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    found = [(".".join(place), _renamed(own))] if own else []
    for name, value in loaded.items():
        if isinstance(name, str) and not (not place and NOT_A_MODEL.fullmatch(name)):
            found += _tables(value, (*place, name))
    return found


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with the parts that torch's own wrappers put into names removed."""
    return {TORCH_WRAPPERS.sub("", name).lstrip("."): tensor for name, tensor in state.items()}


def _fitting_places(flat: Mapping[str, Tensor], fitting: Mapping[str, Any], *, whole: bool, partly: bool) -> list[str]:
    """Return the prefixes in the checkpoint under which all of a model's tensors are, or else most of them."""
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in fitting.items()}
    found: Counter[str] = Counter()
    for name, tensor in flat.items():
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if shapes.get(name[start:]) == tuple(tensor.shape):
                found[name[:start]] += 1
    most = max(found.values(), default=0)
    if most == len(shapes):
        return [place for place, count in found.items() if count == most]
    if whole or most < LEAST_COVER * len(shapes):
        return []
    places = [place for place, count in found.items() if count > NEARLY * most]
    # If names are missing, the rest may be an author's own, which a library can only convert if all are unchanged.
    return [place for place in places if partly or all(f"{place}{name}" in flat for name in shapes)]


def _flat(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{place}.{name}" if place else name: tensor
        for place, table in tables.items()
        for name, tensor in table.items()
    }


def _stripped(flat: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    return {name[len(place) :]: tensor for name, tensor in flat.items() if name.startswith(place)}


def _under(tables: Mapping[str, Mapping[str, Tensor]], key: str, path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors below a key, which is a table's name or a prefix of tensor names.

    Raises: TeacherError that lists the available keys if there are no tensors below this one.
    """
    wanted = TORCH_WRAPPERS.sub("", key).strip(".") + "."
    flat = _flat(tables)
    for place in ("", *(f"{table}." for table in tables if table), "module.", *(f"{t}.module." for t in tables if t)):
        if found := _stripped(flat, place + wanted):
            return {"": found}
    there = sorted({*filter(None, tables), *(name.partition(".")[0] for name in tables.get("", {}) if "." in name)})
    raise TeacherError(
        f"{path} has no tensors under --weights-key {key}; available keys: {', '.join(there[:12]) or 'none'}"
    )


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state without trainers' prefixes that all names share."""
    while state:
        first = {name.partition(".")[0] for name in state}
        if len(first) > 1 or not first & WRAPPERS or any("." not in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def _several(path: Path, places: list[str], remedy: str) -> str:
    names = [place.strip(".") or "(names without a key)" for place in places]
    return f"{path} holds the weights of several models, under {', '.join(names[:-1])} and {names[-1]}; {remedy}"


def load_state_dict_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy every tensor of `state` into `model`, or none.

    Raises: TeacherError with counts and up to three examples of missing, unexpected and wrongly shaped tensors.
    """
    misfits = find_misfits(model, state)
    if any(misfits.values()):
        raise TeacherError(f"the weights in {source} do not fit the model: {describe_misfits(misfits)}")
    model.load_state_dict(state, strict=True)


def find_misfits(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the tensors that do not fit a model, sorted: "missing", "unexpected", "wrong shape" (with both shapes)."""
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {
        "missing": sorted(want.keys() - have.keys()),
        "unexpected": sorted(have.keys() - want.keys()),
        "wrong shape": [
            f"{name} {have[name]} for {want[name]}"
            for name in sorted(want.keys() & have.keys())
            if have[name] != want[name]
        ],
    }


def describe_misfits(misfits: Mapping[str, list[str]]) -> str:
    """Return counts and up to three examples of each kind that occurs: "2 missing (a, b), 1 unexpected (c)"."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in misfits.items()
        if names
    )


def weights_digest(module: nn.Module) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every tensor of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())  # as bytes, because NumPy has no bfloat16
    return digest.hexdigest()
