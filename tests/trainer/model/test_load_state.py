import pytest
import torch
from torch import nn
from torchvision import models

from trainer.model.build import build
from trainer.model.load_state import load_state


@pytest.mark.parametrize("assign", [False, True])
def test_tensors_without_versions_are_loaded(assign: bool) -> None:
    saved = models.mnasnet0_5(num_classes=3)
    model = (
        models.mnasnet0_5(num_classes=3)
        if not assign
        else build("mnasnet0_5", image_size=64, num_classes=3, empty=True)
    )
    tensors = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    load_state(model, tensors, assign=assign)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_other_names_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        load_state(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})
