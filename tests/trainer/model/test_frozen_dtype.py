import torch
from torch import nn
from torchvision import models

from trainer.model.frozen_dtype import store_frozen_weights


def test_frozen_weights_of_layers_are_stored_in_bfloat16_and_trained_ones_in_float32() -> None:
    torch.manual_seed(0)
    model = models.vit_b_16(image_size=32, num_classes=2).requires_grad_(requires_grad=False)
    model.heads.requires_grad_(requires_grad=True)
    nn.init.normal_(model.heads.head.weight)  # torchvision's zeros would hide all differences
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    bytes_before = sum(parameter.nbytes for parameter in parameters.values())
    store_frozen_weights(model, torch.bfloat16)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    in_float32 = {name for name, parameter in parameters.items() if parameter.dtype == torch.float32}
    kinds = ("class_token", "pos_embedding", "ln_1", "ln_2", "encoder.ln", "heads", "self_attention")
    assert in_float32 == {name for name in parameters if any(kind in name for kind in kinds)}
    assert sum(parameter.nbytes for parameter in parameters.values()) < 0.67 * bytes_before
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        store_frozen_weights(model.requires_grad_(requires_grad=True), torch.bfloat16)
        assert torch.equal(model(images), logits)
        model.load_state_dict(before)
        assert torch.equal(model(images), logits), "autocast rounds the weights to the same values"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
