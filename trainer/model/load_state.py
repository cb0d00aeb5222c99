"""Load tensors into a model."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load all tensors of a model, as those of this version of its modules.

    `state_dict` notes the versions of modules beside the tensors, and files do not hold them: torchvision's MNASNet
    refuses tensors of no version.

    Args:
        model: the model.
        tensors: name -> tensor, for all names of the model's state dict.
        assign: whether the tensors become the model's own, instead of being copied.

    """
    state = OrderedDict(tensors)
    state._metadata = cast(OrderedDict[str, Tensor], model.state_dict())._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, assign=assign)
