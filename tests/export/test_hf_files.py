"""Exports for the Transformers library, loaded by its Auto classes alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from exporting import (
    CONVNEXT,
    SIZE,
    VIT,
    Exports,
    assert_teaches,
    centre_view,
    fill,
    least_cosine,
    photograph,
    said_in_a_loop,
    some_slow,
    tokens_of,
)
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from eupe.common.compute import normalise
from eupe.export.hf_names import native
from eupe.export.sample_pictures import varied_pictures
from eupe.models.encoder import load_encoder

CLASSES = {
    VIT: "DINOv3ViTModel",
    CONVNEXT: "DINOv3ConvNextModel",
    "convnext_atto": "DINOv3ConvNextModel",
    "test_vit": "TimmWrapperModel",
    "convnext_atto_ols": "TimmWrapperModel",
    "tf_efficientnet_lite0": "TimmWrapperModel",
    "vit_small_patch16_eupe": "TimmWrapperModel",
}


SLOW = ("convnext_atto", "convnext_atto_ols", "tf_efficientnet_lite0", "vit_small_patch16_eupe")
ARCHS = some_slow(VIT, CONVNEXT, "test_vit", slow=SLOW)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("hf"), "hf", heads=("dinov2-s",))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_auto_classes_give_the_run_s_tokens(arch: str, exports: Exports) -> None:
    encoder, model = load_encoder(exports.run(arch)).eval(), AutoModel.from_pretrained(exports.out(arch)).eval()
    assert type(model).__name__ == CLASSES[arch]
    assert json.loads((exports.out(arch) / "export.json").read_text())["report"]["kind"] == CLASSES[arch]
    pixels = normalise(torch.from_numpy(varied_pictures(SIZE, SIZE, seed=7)), encoder.spec.mean, encoder.spec.std)
    with torch.inference_mode():
        answer, tokens = model(pixel_values=pixels), encoder(pixels)
    assert least_cosine(answer.pooler_output, tokens.summary) > 0.99999
    if CLASSES[arch] != "TimmWrapperModel":
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        assert least_cosine(answer.last_hidden_state[:, prefix:], tokens.dense.flatten(1, 2)) > 0.99999
    assert getattr(model.config, "auto_map", None) is None, "no remote code"


@pytest.mark.parametrize("arch", ARCHS)
def test_an_export_teaches(arch: str, exports: Exports) -> None:
    assert_teaches(f"hf:{exports.out(arch)}", exports.run(arch))
    if CLASSES[arch] == "TimmWrapperModel":
        assert_teaches(f"timm:local-dir:{exports.out(arch)}", exports.run(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_image_processor_prepares_what_the_student_was_trained_on(
    arch: str, exports: Exports, tmp_path: Path
) -> None:
    prepare = AutoImageProcessor.from_pretrained(exports.out(arch))
    spec = load_encoder(exports.run(arch)).spec
    for width, most in ((110, 0.01), (150, 0.1)):  # of a wide one, crop and resize come in another order
        path = photograph(tmp_path / "p.png", width=width)
        pixels = prepare(Image.open(path), return_tensors="pt")["pixel_values"]
        ours = normalise(centre_view(path, SIZE), spec.mean, spec.std)
        assert pixels.shape == ours.shape
        assert (pixels - ours).abs().mean() < most
    if CLASSES[arch] != "TimmWrapperModel":
        plain = json.loads((exports.out(arch) / "preprocessor_config.json").read_text())
        assert plain["crop_size"] == {"height": SIZE, "width": SIZE}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_code_in_the_card_loads_it_by_the_auto_classes(arch: str, exports: Exports, tmp_path: Path) -> None:
    path = photograph(tmp_path / "p.png", width=110)
    _, summary, dense = tokens_of(exports.run(arch), path)
    for said in said_in_a_loop(exports.out(arch), [path, path]):
        assert least_cosine(said["summary"], summary) > 0.999
        assert least_cosine(said["dense"], dense) > 0.99
        assert said["teachers"].keys() == {"dinov2-s.summary", "dinov2-s.dense"}


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit_small_plus_patch16_dinov3_qkvb", {"depth": 2}),
        ("vit_small_patch16_dinov3", {"depth": 2}),
        ("vit_7b_patch16_dinov3", {"depth": 1, "embed_dim": 256, "num_heads": 4}),
        ("test_convnext2", {}),
    ],
)
def test_variants_of_the_families_are_the_library_s_own(arch: str, options: dict[str, Any]) -> None:
    """Gated MLPs, no biases, the biggest one's widths."""
    import transformers

    model = timm.create_model(arch, num_classes=0, img_size=SIZE, **options) if options else timm.create_model(arch)
    fill(model)
    model.eval()
    translated = native(arch, model, SIZE)
    assert translated is not None
    theirs = getattr(transformers, translated.model)(getattr(transformers, translated.config)(**translated.options))
    theirs.load_state_dict(translated.state, strict=True)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        got = theirs.eval()(pixels).last_hidden_state
        want = model.forward_features(pixels)
        if want.ndim == 4:
            got, want = got[:, 1:], model.head.norm(want).flatten(2).mT
    assert least_cosine(got, want) > 0.99999


@pytest.mark.parametrize(
    "arch",
    [
        "convnextv2_atto",
        "convnext_zepto_rms",
        "convnext_atto_ols",
        "test_convnext3",
        "vit_small_patch16_224",
    ],
)
def test_architectures_with_other_parts_are_not_taken_for_the_library_s(arch: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=0)
    translated = native(arch, model, 224)
    assert translated is None


def test_positions_are_not_stretched_when_the_export_is_trained_on(exports: Exports) -> None:
    """The library's default would rescale them at random in training mode."""
    model = AutoModel.from_pretrained(exports.out(VIT)).train()
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first, second = (model(pixel_values=pixels).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_llava_sees_through_an_export(exports: Exports) -> None:
    """The vision tower is the directory; the language model is tiny and random."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = AutoModel.from_pretrained(exports.out(VIT))
    picture_token, registers, cells = 90, 4, (SIZE // 16) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=picture_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # without the first token, the summary
        image_seq_length=registers + cells,
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    words = torch.tensor([[1, *[picture_token] * (registers + cells), 7, 8]])
    encoder = load_encoder(exports.run(VIT)).eval()
    views = torch.from_numpy(varied_pictures(SIZE, SIZE)[[0, 8]])
    pixels = normalise(views, encoder.spec.mean, encoder.spec.std)
    seen: list[Any] = []
    llava.model.multi_modal_projector.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.inference_mode():
        logits = [llava(input_ids=words, pixel_values=one[None]).logits for one in pixels]
        dense = encoder(pixels).dense.flatten(1, 2)
        normed = llava.model.vision_tower.norm(torch.cat(seen))
    assert logits[0].shape == (1, 3 + registers + cells, 100)
    assert not torch.allclose(logits[0][:, -1], logits[1][:, -1]), "what is said depends on the picture"
    assert least_cosine(normed[:, registers:], dense) > 0.99999, "the projector sees our tokens, ahead of the last norm"
