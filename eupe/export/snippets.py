"""Code for an export's card that loads the export and runs it on a picture, with the format's library, without eupe."""

from __future__ import annotations

from collections.abc import Sequence

from eupe.export.config import COREML, EXECUTORCH, HF, LITERT, ONNX, OPENVINO, TIMM, ExportConfig
from eupe.export.coreml_files import output_names
from eupe.export.hf_files import native_of
from eupe.export.source import Source
from eupe.export.timm_files import dense_lines
from eupe.finetune.config import CLASSIFY, SEGMENT

HEADS = """
heads = load_file(f"{DIR}/heads.safetensors")


def said(name, token):
    hidden = F.linear(token, heads[f"{name}.0.weight"])
    hidden = F.layer_norm(hidden, hidden.shape[-1:], heads[f"{name}.1.weight"], heads[f"{name}.1.bias"])
    return F.linear(F.gelu(hidden), heads[f"{name}.3.weight"], heads[f"{name}.3.bias"])


"""
HEADS_IMPORTS = ("import torch.nn.functional as F", "from safetensors.torch import load_file")


def snippet(source: Source, config: ExportConfig) -> str:
    """Return Python code that computes `summary`, `dense` and the heads' outputs of PICTURE with the export in DIR.

    The lines that load the export come first, so that the rest can be run again for each picture.
    """
    once, each = WRITERS[config.format](source)
    if source.facts is not None:
        return f"{_lines(_named(once, source))}\n{_lines([*each, *_answer(source)])}"
    if not source.heads or config.format not in (TIMM, HF):
        return f"{_lines(once)}\n{_lines(each)}"
    imports = once.index("")
    once = [*once[:imports], *HEADS_IMPORTS, *once[imports:]]
    asked = (f'    "{name}": said("{name}", {name.rpartition(".")[2]}),' for name in source.heads)
    return f"{_lines(once)}{HEADS}{_lines([*each, 'teachers = {', *asked, '}'])}"


def _named(once: list[str], source: Source) -> list[str]:
    """Return lines that also read the names of the classes, if there are any."""
    names = ['classes = open(f"{DIR}/labels.txt", encoding="utf-8").read().splitlines()'] if source.classes else []
    return [*once, *names]


def _answer(source: Source) -> list[str]:
    """Return lines that tell the answer of a fine-tuned model for the first picture."""
    assert source.facts is not None
    if source.facts.task == CLASSIFY:
        return ["answer = classes[int(logits[0].argmax())]"]
    if source.facts.task == SEGMENT:
        return [
            "answer = [[classes[int(cell.argmax())] for cell in row] for row in logits[0]]  # a class for each cell"
        ]
    return ["answer = depth[0, :, :, 0]  # metres, for each cell"]


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _timm(source: Source) -> tuple[list[str], list[str]]:
    without_head = "" if source.facts else ", num_classes=0"
    once = [
        "import timm",
        "import torch",
        "from PIL import Image",
        "",
        f'model = timm.create_model(f"local-dir:{{DIR}}", pretrained=True{without_head}).eval()',
        "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]
    each = [
        'pixels = prepare(Image.open(PICTURE).convert("RGB"))[None]',
        "with torch.inference_mode():",
        "    features = model.forward_features(pixels)",
        "    summary = model.forward_head(features, pre_logits=True)",
        *(f"    {line}" for line in dense_lines(source.encoder.spec, source.encoder.model)),
        *(["    logits = model.forward_head(features)"] if source.facts else []),
    ]
    return once, each


def _hf(source: Source) -> tuple[list[str], list[str]]:
    spec, translated = source.encoder.spec, native_of(source)
    if translated is None:
        dense = dense_lines(spec, source.encoder.model, features="answer.last_hidden_state", name="model.timm_model")
    else:
        cells = f"(pixels.shape[-2] // {spec.patch}, pixels.shape[-1] // {spec.patch})"
        dense = [f"dense = answer.last_hidden_state[:, {translated.prefix}:].unflatten(1, {cells})"]
    once = [
        "import torch",
        "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        "model = AutoModel.from_pretrained(DIR).eval()",
        "prepare = AutoImageProcessor.from_pretrained(DIR)",
    ]
    each = [
        'pixels = prepare(Image.open(PICTURE).convert("RGB"), return_tensors="pt")["pixel_values"]',
        "with torch.inference_mode():",
        "    answer = model(pixel_values=pixels)",
        "    summary = answer.pooler_output",
        *(f"    {line}" for line in dense),
    ]
    return once, each


def _onnx(source: Source) -> tuple[list[str], list[str]]:
    teachers = ", ".join(f'"{name}"' for name in source.heads)
    heads = _variables(source)
    once = [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        'session = onnxruntime.InferenceSession(f"{DIR}/model.onnx")',
    ]
    each = [
        *_prepared(source),
        'summary, dense = session.run(["summary", "dense"], {"pixels": pixels})',
        *([f'{heads} = session.run([{teachers}], {{"pixels": pixels}})'] if source.heads else []),
    ]
    return once, each


def _openvino(source: Source) -> tuple[list[str], list[str]]:
    once = [
        "import numpy as np",
        "import openvino",
        "from PIL import Image",
        "",
        'in_float32 = {"INFERENCE_PRECISION_HINT": "f32"}',
        'model = openvino.Core().compile_model(f"{DIR}/model.xml", "CPU", in_float32)',
    ]
    return once, [*_prepared(source), 'answers = model({"pixels": pixels})', *_named_answers(source)]


def _litert(source: Source) -> tuple[list[str], list[str]]:
    once = [
        "import numpy as np",
        "from ai_edge_litert.interpreter import Interpreter",
        "from PIL import Image",
        "",
        'model = Interpreter(model_path=f"{DIR}/model.tflite").get_signature_runner()',
    ]
    return once, [*_prepared(source), "answers = model(pixels=pixels)", *_named_answers(source)]


def _coreml(source: Source) -> tuple[list[str], list[str]]:
    once = [
        "import coremltools",
        "import numpy as np",
        "from PIL import Image",
        "",
        'model = coremltools.models.MLModel(f"{DIR}/model.mlpackage")',
    ]
    _, _, *heads = output_names(source)
    return once, [*_prepared(source), 'answers = model.predict({"pixels": pixels})', *_named_answers(source, heads)]


def _named_answers(source: Source, heads: Sequence[str] | None = None) -> list[str]:
    """Return lines of code that take the outputs from `answers`, by name.

    Args:
        heads: names of the heads' outputs in the file; None if they are the source's.
    """
    names = list(source.heads) if heads is None else list(heads)
    return [
        'summary, dense = answers["summary"], answers["dense"]',
        *([f"{_variables(source)} = [answers[name] for name in {names}]"] if names else []),
    ]


def _executorch(source: Source) -> tuple[list[str], list[str]]:
    teachers = ", *teachers" if source.heads else ""
    outputs = "summary, dense" + (f", {', '.join(source.heads)}" if source.facts else teachers)
    once = [
        "import numpy as np",
        "import torch",
        "from executorch.runtime import Runtime",
        "from PIL import Image",
        "",
        'method = Runtime.get().load_program(f"{DIR}/model.pte").load_method("forward")',
    ]
    return once, [*_prepared(source), f"{outputs} = method.execute([torch.from_numpy(pixels)])"]


def _variables(source: Source) -> str:
    """Return the left side of an assignment of the outputs of all heads: a list, or a variable for each answer."""
    return ", ".join(source.heads) + "," if source.facts else "teachers"


def _prepared(source: Source) -> list[str]:
    """Return lines of code that turn a picture into `pixels` with Pillow and NumPy alone."""
    spec = source.encoder.spec
    return [
        'picture = Image.open(PICTURE).convert("RGB")',
        "side = min(picture.size)",
        "left, top = (picture.width - side) // 2, (picture.height - side) // 2",
        "picture = picture.crop((left, top, left + side, top + side))",
        f"picture = picture.resize(({spec.size}, {spec.size}), Image.Resampling.BICUBIC)",
        "pixels = np.asarray(picture, np.float32) / 255",
        f"pixels = (pixels - np.float32({list(spec.mean)})) / np.float32({list(spec.std)})",
        "pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])",
    ]


WRITERS = {
    TIMM: _timm,
    HF: _hf,
    ONNX: _onnx,
    OPENVINO: _openvino,
    EXECUTORCH: _executorch,
    LITERT: _litert,
    COREML: _coreml,
}
"""Per format: the lines that load the export, and those that run it on a picture."""
