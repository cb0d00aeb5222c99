import dataclasses
import json
import math
import random
import struct
from typing import Any

import pytest

from tests.trainer.checkpoint.checkpoints import (
    IDENTITY,
    INVALID,
    JsonPath,
    edited,
    json_entries,
    make_state,
    with_metadata,
)
from trainer.checkpoint.state import FORMAT, CheckpointId, CheckpointState
from trainer.errors import UserError
from trainer.metrics import BestEpoch, MetricState


def read(state: CheckpointState) -> CheckpointState:
    return CheckpointState.from_json(state.to_json().decode())


@pytest.mark.parametrize("checkpoint", [(0, 0), (120, 4), (10**8, 10**4), (10**15 - 1, 10**15 - 1)], ids=str)
def test_checkpoint_name_round_trip(checkpoint: tuple[int, int]) -> None:
    assert CheckpointId.of(CheckpointId(*checkpoint).name) == checkpoint
    assert CheckpointId(120, 4).name == "step-00000120-epoch-0004"


def test_other_names_are_not_checkpoints() -> None:
    for name in (
        *("step-120-epoch-4", "step-000000120-epoch-0004", "step-00000120-epoch-00004", "LATEST", ""),
        *("step-00000120-epoch-0004\n", "step-00000120-epoch-0004.tmp", "damaged-1-step-00000120-epoch-0004"),
        *("step--0000120-epoch-0004", "step-٠٠٠٠٠١٢٠-epoch-0004", f"step-{'9' * 5000}-epoch-0001"),
    ):
        assert CheckpointId.of(name) is None, name


NAMES = ("\udcff", "\udc80\udcfe", "a\udcffb", "\ud7ff", "\U0010ffff", "\0", '"\\', "e\u0301", "é", "")
OTHER_IDENTITY = dataclasses.replace(IDENTITY, classes=NAMES, examples=(1,) * len(NAMES))


@pytest.mark.parametrize(
    "state",
    [
        make_state(),
        make_state(3, 1),
        make_state(3, 0),
        make_state(0, 0, best=None, scaler={}, run=with_metadata(seed=0)),
        make_state(2**40 * 3, 2**40),
        make_state(run=with_metadata(identity=OTHER_IDENTITY)),
        make_state(
            run=with_metadata(world_size=2),
            metrics=MetricState(rows=((1e-320, 0, 2**62), (7, 0, 0)), seconds=0.0, compute_seconds=0.0),
        ),
    ],
)
def test_state_round_trip(state: CheckpointState) -> None:
    assert read(state) == state
    assert state.to_json().isascii()


def test_floats_round_trip_bit_for_bit() -> None:
    values = [-0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1 + 0.2, 1 / 3]
    values += filter(math.isfinite, struct.unpack("<2000d", random.Random(5).randbytes(16_000)))
    sums = MetricState(rows=tuple((value, 0, 0) for value in values), seconds=values[3], compute_seconds=0.1)
    metrics = read(make_state(metrics=sums, run=with_metadata(world_size=len(values)))).metrics
    assert metrics is not None
    assert [struct.pack("<d", row[0]) for row in metrics.rows] == [struct.pack("<d", value) for value in values]


def test_values_that_are_not_finite_are_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_state(best=BestEpoch(epoch=1, step=3, value=math.nan, loss=0.0)).to_json()


VALID = json.loads(make_state().to_json())
ENTRIES = dict(json_entries(VALID))


def parse(content: object) -> CheckpointState:
    return CheckpointState.from_json(json.dumps(content))


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: ".".join(map(str, path)))
def test_missing_fields_and_values_of_another_type_are_refused(path: JsonPath) -> None:
    is_for_readers = path[:2] in (("run", "schedule"), ("run", "auto_resolved")) and len(path) > 2
    is_optional = is_for_readers or (path[:2] == ("run", "versions") and len(path) > 2)
    is_count = type(ENTRIES[path]) is int and path[0] != "scaler" and not is_for_readers
    values = [] if is_for_readers else [*INVALID[type(ENTRIES[path])], *((-1, 1.5, 2**63) if is_count else ())]
    contents = [edited(VALID, path, value) for value in values if (path, value) != (("best",), None)]
    if is_optional:
        parse(edited(VALID, path))
    else:
        contents.append(edited(VALID, path))
    for content in contents:
        with pytest.raises((ValueError, TypeError, KeyError, UserError)) as caught:
            parse(content)
        assert str(caught.value), content


@pytest.mark.parametrize("parent", [(), ("metrics",), ("best",), ("run",), ("run", "identity"), ("scaler",)])
def test_unknown_fields_are_refused(parent: JsonPath) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse(edited(VALID, (*parent, "more"), 1))


def test_a_state_of_a_later_version_is_refused() -> None:
    with pytest.raises(UserError, match=f"of format {FORMAT + 1}, written by a later version of regraft"):
        parse(edited(VALID, ("format",), FORMAT + 1))


def test_a_state_of_format_2_is_read() -> None:
    best = {"accuracy" if key == "value" else key: value for key, value in VALID["best"].items()}
    assert parse(VALID | {"format": 2, "best": best}) == parse(VALID)
    assert parse(VALID | {"format": 2, "best": None}).best is None


SUMS = make_state().metrics


@pytest.mark.parametrize(
    "state",
    [
        make_state(2, 1, metrics=None),  # before the start of the epoch
        make_state(7, 1, metrics=SUMS),  # after its end
        make_state(4, 1, metrics=None),
        make_state(3, 1, metrics=SUMS),
        make_state(3, 0, metrics=None),
        make_state(2**63, 2**63 // 3, metrics=SUMS),
        *(make_state(metrics=SUMS, run=with_metadata(world_size=world_size)) for world_size in (0, 2)),
        make_state(metrics=SUMS, run=with_metadata(steps_per_epoch=0)),
    ],
)
def test_contradicting_counters_and_sums_are_refused(state: CheckpointState) -> None:
    with pytest.raises(ValueError, match="its state is not valid"):
        read(state)


ANT, CAT, LINES, BROKEN = IDENTITY.classes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"classes": tuple(map(str, range(1000))), "examples": (1,) * 1000},
            "classes: 0, 1, 2, 3, 4 and 995 more only there, ant, 猫 🐈, two\\nlines, broken \\xff bytes only now",
        ),
        ({"classes": IDENTITY.classes[::-1], "examples": (1, 2, 3, 4)}, "classes: in another order"),
        (
            {"examples": (4, 3, 5, 7), "data": "other"},
            "training images: two\\nlines 5 there, 2 now, broken \\xff bytes 7 there, 1 now",
        ),
        ({"data": "other"}, "images: the same number of each class, but other files or another split"),
        (
            {"architecture": "vgg\x1b11", "classes": ("a", CAT, LINES, BROKEN), "examples": (4, 3, 3, 1)},
            "model: vgg\\x1b11 there, resnet18 now\n"
            "classes: a only there, ant only now\n"
            "training images: two\\nlines 3 there, 2 now",
        ),
    ],
)
def test_differences_of_identity_are_listed(changes: dict[str, Any], expected: str) -> None:
    other = dataclasses.replace(IDENTITY, **changes)
    other.check_same(dataclasses.replace(other), "itself")
    with pytest.raises(UserError) as caught:
        other.check_same(IDENTITY, "run/checkpoints/step-00000003-epoch-0001")
    first, *lines, last = str(caught.value).split("\n  ")
    assert first == "run/checkpoints/step-00000003-epoch-0001: a checkpoint of another run:"
    assert "\n".join([*lines, last.partition("\n")[0]]) == expected
