import argparse
import datetime
import functools
import pathlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.model.state_dict import SelectedState, select_state
from trainer.model.weights import read_weights

State = dict[str, Tensor]
NAMES = ("conv.weight", "layer1.conv.weight", "layer1.bn.bias", "layer1.bn.running_mean", "fc.weight")
RAW: State = {name: torch.full((2,), float(number)) for number, name in enumerate(NAMES)}
AVERAGE: State = {name: tensor + 100 for name, tensor in RAW.items()}
COUNTERS = {"layer1.bn.num_batches_tracked": torch.tensor(3)}


def prefixed(prefix: str, state: State = RAW) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def select(content: Any, key: str = "auto") -> SelectedState:
    return select_state(content, [*NAMES, *COUNTERS], key=key, path="weights.pth")


def is_state(tensors: State, expected: State) -> bool:
    return all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


PREFIXES = (
    *("", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "model.", "encoder.", "net.", "0.", "student."),
    *("teacher.", "module.encoder_q.", "module.base_encoder.", "model.backbone.", "teacher.backbone.", "ema."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state", "model_state_dict", "net", "weights"])
def test_wrappers_and_prefixes_are_removed(prefix: str, wrapper: str) -> None:
    state = prefixed(prefix, RAW | COUNTERS)
    content: Any = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    selected = select(content if wrapper else state)
    assert selected.tensors.keys() == RAW.keys() | COUNTERS.keys()
    assert is_state(selected.tensors, RAW)
    assert selected.others == ()
    where = ".".join(filter(None, (wrapper, prefix.rstrip("."))))
    average = ", an average of the weights" if prefix == "ema." else ""
    assert selected.notes == ((f"the weights are those under {where!r} in the file{average}",) if where else ())


AVERAGES: dict[str, tuple[Any, str]] = {
    "timm": ({"state_dict": RAW, "state_dict_ema": AVERAGE}, "state_dict_ema"),
    "model_ema": ({"model": RAW, "model_ema": AVERAGE | {"n_averaged": torch.tensor(1)}}, "model_ema"),
    "ema first": ({"ema": AVERAGE, "model": RAW}, "ema"),
    "ema_state_dict": ({"ema_state_dict": prefixed("module.", AVERAGE), "state_dict": RAW}, "ema_state_dict"),
    "Lightning": ({"state_dict": prefixed("model.") | prefixed("ema_model.", AVERAGE)}, "ema_model"),
    "MoCo": ({"state_dict": prefixed("module.encoder_k.", AVERAGE) | prefixed("module.encoder_q.")}, "encoder_k"),
    "BYOL": (prefixed("online_encoder.net.") | prefixed("target_encoder.net.", AVERAGE), "target_encoder"),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights_are_taken_by_their_key_only(kind: str) -> None:
    content, key = AVERAGES[kind]
    selected = select(content)
    assert is_state(selected.tensors, RAW)
    assert selected.notes[-1].startswith("the file also contains averaged weights, which are not used: --model.weights")
    label = selected.notes[-1].split()[-3]
    for name in (key, label):
        averaged = select(content, name)
        assert is_state(averaged.tensors, AVERAGE)
        assert averaged.notes == (f"the weights are those under {label!r} in the file, an average of the weights",)


@pytest.mark.parametrize(
    "content",
    [
        prefixed("student.") | prefixed("teacher.", AVERAGE),
        {"student": prefixed("module.backbone."), "teacher": prefixed("backbone.", AVERAGE)},
    ],
)
def test_student_and_teacher_have_to_be_chosen(content: Any) -> None:
    with pytest.raises(
        UserError, match=r"weights.pth: contains several models: student.*, teacher.*--model.weights_key"
    ):
        select(content)
    assert is_state(select(content, "student").tensors, RAW)
    assert is_state(select(content, "teacher").tensors, AVERAGE)
    with pytest.raises(UserError, match=r"no such model under model.weights_key tutor; expected student.*, teacher"):
        select(content, "tutor")


def test_equal_copies_need_no_choice_and_other_tensors_are_named() -> None:
    content = prefixed("model.") | prefixed("net.") | {"queue": torch.zeros(2)}
    selected = select(content)
    assert is_state(selected.tensors, RAW)
    assert selected.others == (*prefixed("net."), "queue")


def test_wrappers_within_the_names_are_removed() -> None:
    wrapped = {name.replace("layer1.", "layer1._fsdp_wrapped_module."): tensor for name, tensor in RAW.items()}
    assert is_state(select({"model": prefixed("net.", wrapped)}).tensors, RAW)


def test_a_few_tensors_under_a_prefix_are_found_and_other_architectures_left_as_they_are() -> None:
    assert select({"backbone.conv.weight": torch.ones(1), "head": torch.ones(2)}).tensors.keys() == {"conv.weight"}
    other = {"blocks.0.conv.weight": torch.ones(1), "blocks.0.norm": torch.ones(1), "blocks.0.q": torch.ones(1)}
    assert select({"state_dict": other, "metrics": {"loss": torch.ones(1)}}).tensors == other


def test_a_file_that_contains_itself_many_times_is_read_once() -> None:
    content: dict[str, Any] = {}
    content |= {f"key {number}": content for number in range(1000)} | {"state_dict": RAW}
    assert is_state(select(content).tensors, RAW)


BESIDE: dict[str, Callable[[], Any]] = {
    "torchvision's references": lambda: {"args": argparse.Namespace(lr=0.1, names=["a"], nested=argparse.Namespace())},
    "NumPy": lambda: {"best": np.float64(3), "scores": np.arange(4.0), "count": np.int64(2), "flag": np.bool_(1)},
    "a path": lambda: {"args": argparse.Namespace(output=pathlib.Path("runs"))},
    "Lightning's hyperparameters": lambda: {
        "hyper_parameters": {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
        "config": SimpleNamespace(date=datetime.date(2020, 1, 1), names=frozenset("a"), shape=slice(3)),
    },
    "a log": lambda: {"log": defaultdict(list, {"loss": [0.1]}), "last": deque([1]), "rng": np.random.default_rng(1)},
    "PyTorch's ImageNet example": lambda: {"best_acc1": torch.tensor(58.0), "arch": "resnet18", "optimizer": {}},
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("is_zip", [True, False])
def test_common_objects_beside_the_tensors_are_not_created(
    kind: str, is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pth"
    state = OrderedDict((name, nn.Parameter(tensor)) for name, tensor in RAW.items())
    torch.save({"state_dict": state, **BESIDE[kind]()}, path, _use_new_zipfile_serialization=is_zip)
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *_, **__: pytest.fail("created"))
    loaded = read_weights("net", str(path), NAMES).tensors
    assert is_state(loaded, RAW)
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_a_module_beside_the_state_dict_is_ignored_and_alone_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.ckpt"
    torch.save({"state_dict": RAW, "hyper_parameters": {"loss": nn.CrossEntropyLoss(), "net": nn.Linear(2, 2)}}, path)
    assert is_state(read_weights("net", str(path), NAMES).tensors, RAW)
    torch.save({"model": nn.Linear(2, 2), "optimizer": {"exp_avg": torch.ones(2)}}, path)
    with pytest.raises(UserError, match="refused, because it contains a whole model as a Python object"):
        read_weights("net", str(path), NAMES)
