"""Code that loads an export and asks it about a picture, for its card: by the format's own library, without eupe."""

from __future__ import annotations

from eupe.export.config import EXECUTORCH, HF, ONNX, ExportConfig
from eupe.export.hf_files import native_of
from eupe.export.source import Source
from eupe.export.timm_files import dense_lines

HEADS = """
import torch.nn.functional as F
from safetensors.torch import load_file

heads = load_file(f"{DIR}/heads.safetensors")


def said(name, token):
    hidden = F.linear(token, heads[f"{name}.0.weight"])
    hidden = F.layer_norm(hidden, hidden.shape[-1:], heads[f"{name}.1.weight"], heads[f"{name}.1.bias"])
    return F.linear(F.gelu(hidden), heads[f"{name}.3.weight"], heads[f"{name}.3.bias"])


"""


def snippet(source: Source, config: ExportConfig) -> str:
    """Python code that asks the export in DIR about the picture at PICTURE: `summary`, `dense`, what the heads say."""
    code = {HF: _hf, ONNX: _onnx, EXECUTORCH: _executorch}.get(config.format, _timm)(source)
    if source.heads and config.format not in (ONNX, EXECUTORCH):
        asked = (f'    "{name}": said("{name}", {name.rpartition(".")[2]}),\n' for name in source.heads)
        code += f"{HEADS}teachers = {{\n{''.join(asked)}}}\n"
    return code


def _timm(source: Source) -> str:
    return "\n".join(
        [
            "import timm",
            "import torch",
            "from PIL import Image",
            "",
            'model = timm.create_model(f"local-dir:{DIR}", pretrained=True, num_classes=0).eval()',
            "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            'pixels = prepare(Image.open(PICTURE).convert("RGB"))[None]',
            "with torch.inference_mode():",
            "    features = model.forward_features(pixels)",
            "    summary = model.forward_head(features, pre_logits=True)",
            *(f"    {line}" for line in dense_lines(source.encoder.card, source.encoder.model)),
            "",
        ]
    )


def _hf(source: Source) -> str:
    card, translated = source.encoder.card, native_of(source)
    if translated is None:
        dense = ["features, model = answer.last_hidden_state, model.timm_model"]
        dense += dense_lines(card, source.encoder.model)
    else:
        cells = f"(pixels.shape[-2] // {card.patch}, pixels.shape[-1] // {card.patch})"
        dense = [f"dense = answer.last_hidden_state[:, {translated.prefix}:].unflatten(1, {cells})"]
    return "\n".join(
        [
            "import torch",
            "from PIL import Image",
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            "model = AutoModel.from_pretrained(DIR).eval()",
            "prepare = AutoImageProcessor.from_pretrained(DIR)",
            'pixels = prepare(Image.open(PICTURE).convert("RGB"), return_tensors="pt")["pixel_values"]',
            "with torch.inference_mode():",
            "    answer = model(pixel_values=pixels)",
            "    summary = answer.pooler_output",
            *(f"    {line}" for line in dense),
            "",
        ]
    )


def _onnx(source: Source) -> str:
    teachers = ", ".join(f'"{name}"' for name in source.heads)
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime",
            "from PIL import Image",
            "",
            *_prepared(source),
            'session = onnxruntime.InferenceSession(f"{DIR}/model.onnx")',
            'summary, dense = session.run(["summary", "dense"], {"pixels": pixels})',
            *([f'teachers = session.run([{teachers}], {{"pixels": pixels}})'] if source.heads else []),
            "",
        ]
    )


def _executorch(source: Source) -> str:
    outputs = "summary, dense, *teachers" if source.heads else "summary, dense"
    return "\n".join(
        [
            "import numpy as np",
            "import torch",
            "from executorch.runtime import Runtime",
            "from PIL import Image",
            "",
            *_prepared(source),
            'method = Runtime.get().load_program(f"{DIR}/model.pte").load_method("forward")',
            f"{outputs} = method.execute([torch.from_numpy(pixels)])",
            "",
        ]
    )


def _prepared(source: Source) -> list[str]:
    """Lines that make `pixels` of a picture with Pillow and NumPy alone."""
    card = source.encoder.card
    return [
        'picture = Image.open(PICTURE).convert("RGB")',
        "side = min(picture.size)",
        "left, top = (picture.width - side) // 2, (picture.height - side) // 2",
        "picture = picture.crop((left, top, left + side, top + side))",
        f"picture = picture.resize(({card.size}, {card.size}), Image.Resampling.BICUBIC)",
        "pixels = np.asarray(picture, np.float32) / 255",
        f"pixels = (pixels - np.float32({list(card.mean)})) / np.float32({list(card.std)})",
        "pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])",
    ]
