import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.trainer.model.timm_sweep import check_model, format_table, try_model
from trainer.errors import UserError
from trainer.model import timm_models
from trainer.model.architectures import check_architecture, same_architecture
from trainer.model.batch_norm import allow_single_value_batches, freeze_batch_norm
from trainer.model.build import build, preset
from trainer.model.create import build_model
from trainer.model.dropout import set_dropout, set_stochastic_depth
from trainer.model.encoder_classifier import EncoderClassifier, with_classifier
from trainer.model.gradient_checkpointing import enable_gradient_checkpointing
from trainer.model.timm_weights import read_timm_weights
from trainer.transfer.frozen_prefix import split_frozen

# One or more models of each family that differs in its stem, blocks or output layer. `pytest -m soak` takes all models.
SAMPLE = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224", "convmixer_768_32",
    "convnext_atto", "crossvit_9_240", "deit_tiny_distilled_patch16_224", "densenet121", "dla34", "edgenext_xx_small",
    "efficientformer_l1", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8",
    "gcvit_xxtiny", "ghostnet_050", "hgnetv2_b0", "hiera_tiny_224", "inception_next_atto", "levit_128s",
    "mambaout_femto", "mixer_s32_224", "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny",
    "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repvit_m0_9", "resnet18",
    "resnetv2_50", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0", "vit_small_patch14_dinov2", "volo_d1_224",
    "xcit_nano_12_p16_224",
]  # fmt: skip
CLASSES = 5


@pytest.mark.parametrize("name", SAMPLE)
def test_the_output_layer_and_the_blocks_of_each_family_are_found(name: str) -> None:
    random_state = torch.get_rng_state()
    check_model(f"timm/{name}")
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_feature_model_gets_a_classifier() -> None:
    assert timm.create_model("vit_small_patch14_dinov2").num_classes == 0
    assert timm.get_pretrained_cfg("vit_small_patch14_dinov2").input_size == (3, 518, 518)
    model = build_model("timm/test_vit", image_size=96, num_classes=CLASSES, weights=None, head_init="xavier").model
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, CLASSES)
    assert model.num_classes == CLASSES


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "samvit_base_patch16", "sam2_hiera_tiny"]
)
def test_models_without_a_classifier_get_that_of_their_family(name: str) -> None:
    assert timm.get_pretrained_cfg(name).num_classes == 0
    assert check_model(f"timm/{name}")["output layer"].startswith("head")


@pytest.mark.parametrize(
    "name", ["mobilenetv5_300m_enc", "qwen3_vit_88m_enc", "deepseek_vit_412m_enc", "gemma4_vit_167m_enc"]
)
def test_encoders_get_a_linear_layer_on_their_pooled_features(name: str) -> None:
    found = check_model(f"timm/{name}")
    assert found["output layer"] == "head"
    assert "linear probe" not in found["without"]


class _Encoder(nn.Module):
    """An encoder that returns features of any shape, of 5 channels."""

    head_hidden_size = 5

    def __init__(self, features: Tensor, output_fmt: str) -> None:
        super().__init__()
        self.features, self.output_fmt = features, output_fmt

    def forward(self, images: Tensor) -> Tensor:
        return self.features


@pytest.mark.parametrize(
    ("shape", "output_fmt"), [((2, 5), "NCHW"), ((2, 7, 5), "NCHW"), ((2, 5, 3, 4), "NCHW"), ((2, 3, 4, 5), "NHWC")]
)
def test_features_of_an_encoder_are_averaged_over_positions(shape: tuple[int, ...], output_fmt: str) -> None:
    features = torch.randn(shape)
    model = with_classifier(_Encoder(features, output_fmt), CLASSES)
    assert isinstance(model, EncoderClassifier)
    channels = features.movedim(1, -1) if output_fmt == "NCHW" and features.ndim == 4 else features
    expected = model.head(channels.reshape(2, -1, 5).mean(1))
    torch.testing.assert_close(model(torch.zeros(2, 3, 8, 8)), expected)


def test_an_encoder_takes_timms_weights_and_those_of_a_run(tmp_path: Path) -> None:
    encoder = timm.create_model("test_vit", num_classes=0)
    model = EncoderClassifier(encoder, CLASSES)
    file = tmp_path / "weights.safetensors"
    expected = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    for state in (encoder.state_dict(), model.state_dict()):
        save_file(state, file)
        read = read_timm_weights("timm/test_vit", str(file), model)
        assert read.tensors.keys() == expected.keys()
        assert all(torch.equal(read.tensors[key], tensor) for key, tensor in expected.items())


def test_presets_are_those_of_timms_evaluation() -> None:
    for name in ("tf_efficientnet_lite0", "vit_small_patch14_dinov2.lvd142m", "convnext_tiny.fb_in22k", "resnet18"):
        config = timm.data.resolve_model_data_config(None, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        found = preset(f"timm/{name}", None)
        assert preset(f"timm/{name}", "DEFAULT") == preset(f"timm/{name}", "folder/file.pth") == found
        transform = timm.data.create_transform(**config)
        resize = transform.transforms[0]
        assert (3, found.image_size, found.image_size) == config["input_size"]
        assert found.resize_size == resize.size
        assert (found.resize, found.interpolation) == ("shorter", resize.interpolation.value)
        assert (found.mean, found.std) == (config["mean"], config["std"])
    assert preset("timm/convnext_base.fb_in22k_ft_in1k_384", None).resize == "squash"
    assert preset("timm/tf_efficientnet_lite0", None).mean == pytest.approx([127 / 255] * 3, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet_18", r"timm [\d.]+ has no model 'resnet_18'. Did you mean timm/resnet18"),
        ("timm/resnet18.a9_in1k", r"no weights 'a9_in1k' of resnet18: set model.name to timm/resnet18, or .*a1_in1k"),
        ("timm/hf-hub:someone/model", "has no model 'hf-hub:someone/model'"),
        ("timm/local-dir:/tmp", "has no model 'local-dir:/tmp'"),
        ("timm/", "has no model ''"),
        ("timm/\x1b[31m", r"has no model '\\x1b"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_an_error_with_suggestions(name: str, message: str) -> None:
    for run in (lambda: check_architecture(name), lambda: build(name, image_size=64), lambda: preset(name, None)):
        with pytest.raises(UserError, match=message):
            run()


def test_a_tag_of_weights_that_is_given_as_weights_is_an_error() -> None:
    with pytest.raises(UserError, match=r"expected DEFAULT, .* in model.name: timm/resnet18.a1_in1k"):
        preset("timm/resnet18", "a1_in1k")


def test_without_timm_an_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_timm(name: str, *args: Any, **options: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    for run in (lambda: build("timm/resnet18", image_size=64), lambda: preset("timm/resnet18", "DEFAULT")):
        with pytest.raises(UserError) as error:
            run()
        assert str(error.value) == (
            "timm/resnet18 is a model of the package timm, which cannot be imported (No module named 'timm'): "
            "pip install 'regraft[timm]'"
        )


def test_names_of_one_architecture_differ_in_the_tag_alone() -> None:
    assert same_architecture("timm/resnet18.a1_in1k", "timm/resnet18")
    assert not same_architecture("timm/resnet18", "resnet18")
    assert not same_architecture("timm/resnet18", "timm/resnet18d")


@pytest.mark.parametrize(
    ("name", "size", "changed"),
    [
        ("test_vit", 96, {"pos_embed"}),
        ("vit_small_patch14_dinov2", 224, {"pos_embed"}),
        ("swin_tiny_patch4_window7_224", 256, set()),
        ("convnext_atto", 160, set()),
    ],
)
def test_the_image_size_may_be_changed(name: str, size: int, changed: set[str]) -> None:
    published = preset(f"timm/{name}", None).image_size
    assert size != published
    shapes = [
        {key: p.shape for key, p in build(f"timm/{name}", image_size=s, empty=True).named_parameters()}
        for s in (size, published)
    ]
    assert {key for key in shapes[0] if shapes[0][key] != shapes[1][key]} == changed


def test_an_unsuitable_image_size_is_an_error_with_suitable_ones() -> None:
    with pytest.raises(UserError) as error:
        build("timm/convnext_atto", image_size=16)
    assert str(error.value).startswith("timm/convnext_atto cannot be trained on images of 16 x 16 px: ")
    assert "Set data.image_size to 32; its published weights take 224" in str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_resnet"])
def test_dropout_and_stochastic_depth_are_timms(name: str) -> None:
    model = build(f"timm/{name}", image_size=64, dropout=0.3, stochastic_depth=0.2)
    line = set_dropout(model, f"timm/{name}", 0.3)
    assert line == "dropout 0.3 before the output layer"
    expected = timm.create_model(name, drop_rate=0.3, drop_path_rate=0.2)
    rates = [[getattr(m, "drop_prob", None) for m in net.modules()] for net in (model, expected)]
    assert rates[0] == rates[1]
    assert set_stochastic_depth(model, f"timm/{name}", 0.2).startswith("stochastic depth up to 0.")
    assert build(f"timm/{name}", image_size=64).state_dict().keys() == model.state_dict().keys()


def test_a_model_without_stochastic_depth_is_an_error() -> None:
    for name in ("convmixer_768_32", "densenet121"):
        with pytest.raises(UserError, match=rf"model.stochastic_depth is 0.1, but timm/{name} has no"):
            build_model(
                f"timm/{name}", image_size=64, num_classes=2, weights=None, head_init="xavier", stochastic_depth=0.1
            )


def test_the_layers_of_a_distilled_model_are_replaced_together() -> None:
    options: dict[str, Any] = {"image_size": 224, "num_classes": CLASSES, "weights": None}
    built = build_model("timm/deit_tiny_distilled_patch16_224", **options, head_init="xavier")
    assert built.heads == ("head", "head_dist")
    assert built.model(torch.randn(1, 3, 224, 224)).shape == (1, CLASSES)
    with pytest.raises(UserError, match="are made by 2 layers, head, head_dist: choose xavier or source-labels"):
        build_model("timm/deit_tiny_distilled_patch16_224", **options, head_init="linear-probe")


def test_class_names_are_those_of_the_weights_data_set() -> None:
    names, data_set = timm_models.class_names("timm/resnet18", 1000)
    assert (data_set, names[310], names[309]) == ("ImageNet-1k", "ant", "bee")
    names, data_set = timm_models.class_names("timm/convnext_tiny.fb_in22k", 21841)
    assert (len(names), data_set) == (21841, "imagenet-22k")
    assert "ant" in names
    with pytest.raises(UserError, match="has 7 rows, which is not the number of classes of a known data set"):
        timm_models.class_names("timm/resnet18", 7)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_resnet", "test_byobnet"])
def test_a_small_model_trains(name: str) -> None:
    built = build_model(f"timm/{name}", image_size=64, num_classes=CLASSES, weights=None, head_init="xavier")
    model = built.model.train()
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(built.layer_order.blocks) >= 5
    assert set(built.layer_order.depth) == {key for key, _ in model.named_parameters()}


def test_batch_norm_with_an_activation_keeps_it_for_a_single_value() -> None:
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(BatchNormAct2d(4))
    allow_single_value_batches(model)
    outputs = model.train()(torch.randn(1, 4, 1, 1) - 3)
    assert (outputs >= 0).all()
    assert model[0].training
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("test_convnext", "stages.1.blocks.0"),
        ("test_efficientnet", "blocks.0.0"),
        ("test_resnet", "layer1.0"),
        ("test_vit", "blocks.0"),
    ],
)
def test_gradient_checkpointing_changes_no_bit(name: str, first: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 64, "num_classes": CLASSES, "weights": None, "head_init": "xavier"}
    built = build_model(f"timm/{name}", **options)
    plain, recomputed = built.model.train(), copy.deepcopy(built.model).train()
    names = enable_gradient_checkpointing(recomputed, [block.name for block in built.layer_order.blocks], built.heads)
    assert first in names
    images = torch.randn(3, 3, 64, 64)
    for model in (plain, recomputed):
        model(images).square().sum().backward()
    for (key, parameter), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad), key
    for (key, buffer), other in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(buffer, other), key


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("test_convnext", "stages.3"),
        ("test_efficientnet", "blocks.3"),
        ("test_resnet", "layer4"),
        ("vit_tiny_patch16_224", "head"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_layers_are_split_off(name: str, trained: str, training: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 64, "num_classes": CLASSES, "weights": None, "head_init": "xavier"}
    model = build_model(f"timm/{name}", **options).model.train(training)
    model.requires_grad_(False)
    freeze_batch_norm(model)
    model.get_submodule(trained).requires_grad_(True)
    split = split_frozen(model, training=training)
    assert split is not None
    assert not any(parameter.requires_grad for parameter in split.prefix.parameters())
    images = torch.randn(3, 3, 64, 64)
    statistics = {key: buffer.clone() for key, buffer in model.named_buffers()}
    assert torch.equal(split.rest(split.prefix(images)), model(images))
    assert all(torch.equal(buffer, statistics[key]) for key, buffer in model.named_buffers())


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_all_models_of_timm() -> None:
    """At least 98 % of them work, and the others are refused by a UserError. Prints the table of docs/timm.md."""
    results = {name: try_model(f"timm/{name}") for name in timm.list_models()}
    print(format_table(results))
    assert not [
        name for name, result in results.items() if isinstance(result, Exception) and not isinstance(result, UserError)
    ]
    assert sum(not isinstance(result, Exception) for result in results.values()) >= 0.98 * len(results)
