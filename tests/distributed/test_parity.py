"""The trainer's losses equal those of a plain implementation of the D2L recipe, on 1, 2 and 3 real processes."""

from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import RankResults
from tests.distributed.d2l_recipe import LR, SEED, recipe_losses, train_examples
from trainer.model.create import build_model
from trainer.seeds import derive_seed

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("processes", [1, 2, 3])]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def resnet_losses(rank_inputs: Path) -> dict[str, list[float]]:
    """Return the losses of the recipe on a ResNet-18, for each reduction."""
    losses = {}
    for reduction in LR:
        torch.manual_seed(derive_seed("weights", SEED))
        weights = str(rank_inputs / "resnet18.safetensors")
        built = build_model("resnet18", image_size=32, num_classes=3, weights=weights, head_init="xavier")
        model = built.model.eval()  # frozen BatchNorm is BatchNorm in eval mode; there is no dropout
        head = list(model.get_submodule(built.heads[0]).parameters())
        losses[reduction] = list(recipe_losses(model, head, train_examples(rank_inputs / "images"), reduction))
    return losses


@pytest.mark.parametrize("reduction", LR)
def test_the_whole_program_follows_the_recipe(
    reduction: str, processes: int, resnet_losses: dict[str, list[float]], rank_results: RankResults
) -> None:
    for result in rank_results(processes):
        assert result["parity"][reduction] == pytest.approx(resnet_losses[reduction], rel=TOLERANCE)
