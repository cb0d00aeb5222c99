"""Objective, mixing and sampling are the global batch's: the same updates on any number of processes, and resumed."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.regularised import CASES, everything
from tests.distributed.test_processes import read, work
from trainer.distributed import context


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    yield everything(context.start(device="cpu", precision="fp32", threads=1))
    torch.set_num_threads(threads)


def test_each_option_trains_to_something_else_and_in_parts_to_the_same(alone: dict[str, Any]) -> None:
    for name in CASES:
        whole, cut = (alone[f"{name}, {parts} parts"] for parts in (1, 2))
        assert cut["parameters"] == pytest.approx(whole["parameters"], abs=2e-6)
        assert [seen for _, _, seen in whole["figures"]] == [22, 22]
    for one, other in itertools.combinations(CASES, 2):
        first, second = (alone[f"{name}, 1 parts"]["parameters"] for name in (one, other))
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1e-3, f"{one} and {other}"


def test_a_run_that_goes_on_equals_one_that_was_not_cut(alone: dict[str, Any]) -> None:
    for name in CASES:
        found = alone[f"{name}, 1 parts"]
        assert found["resumed"] == found["parameters"], name
        assert found["resumed figures"] == found["figures"], name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_make_the_same_updates_and_go_on_with_them(
    processes: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    work(["regularised"], processes, tmp_path)
    several, *others = read("regularised", processes, tmp_path)
    assert all(other == several for other in others)
    assert several.keys() == {name for name in alone if not name.startswith("plain")}
    for name, found in several.items():
        assert found["parameters"] == pytest.approx(alone[name]["parameters"], abs=2e-6), name
        for (loss, *counted), (other_loss, *others_counted) in zip(
            found["figures"], alone[name]["figures"], strict=True
        ):
            assert loss == pytest.approx(other_loss, rel=1e-5), name
            assert counted == others_counted, name
        if "2 parts" in name:
            continue
        if processes == 2:
            assert found["resumed"] == found["parameters"], name
        else:  # after its first step DDP gathers the gradients in other portions: another order of three terms
            assert found["resumed"] == pytest.approx(found["parameters"], abs=1e-6), name
        assert [seen for _, _, seen in found["resumed figures"]] == [22, 22]
