import copy
import dataclasses
import json
import math
import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.trainer.checkpoint.checkpoints import IDENTITY, SCALER, make_state, with_metadata
from trainer.checkpoint.state import FORMAT, CheckpointId, CheckpointState
from trainer.errors import UserError
from trainer.metrics import BestEpoch, MetricState

Path = tuple[str | int, ...]


def read(state: CheckpointState | str) -> CheckpointState:
    return CheckpointState.from_json(state if isinstance(state, str) else state.to_json().decode())


@pytest.mark.parametrize("checkpoint", [(0, 0), (120, 4), (10**8, 10**4), (10**15 - 1, 10**15 - 1)], ids=str)
def test_checkpoint_name_round_trip(checkpoint: tuple[int, int]) -> None:
    assert CheckpointId.of(CheckpointId(*checkpoint).name) == checkpoint
    assert CheckpointId(120, 4).name == "step-00000120-epoch-0004"


def test_other_names_are_not_checkpoints() -> None:
    for name in (
        *("step-120-epoch-4", "step-000000120-epoch-0004", "step-00000120-epoch-00004", "LATEST", ""),
        *("step-00000120-epoch-0004\n", "step-00000120-epoch-0004.tmp", " step-00000120-epoch-0004"),
        *("step--0000120-epoch-0004", "step-+0000120-epoch-0004", "step-0000_120-epoch-0004"),
        *("step-٠٠٠٠٠١٢٠-epoch-0004", f"step-{'9' * 5000}-epoch-0001"),
        *("damaged-1-step-00000120-epoch-0004", ".writing-step-00000120-epoch-0004-ab"),
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
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    random_bytes = random.Random(seed).randbytes
    values = [-0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1 + 0.2, 1 / 3]
    values += filter(math.isfinite, struct.unpack("<2000d", random_bytes(16_000)))
    sums = MetricState(rows=tuple((value, 0, 0) for value in values), seconds=values[3], compute_seconds=0.1)
    best = BestEpoch(epoch=1, step=3, accuracy=values[8], loss=values[9])
    state = make_state(metrics=sums, run=with_metadata(world_size=len(values)), best=best)
    assert read(state).to_json() == state.to_json()
    metrics = read(state).metrics
    assert metrics is not None
    assert [struct.pack("<d", row[0]) for row in metrics.rows] == [struct.pack("<d", value) for value in values]


def test_values_that_are_not_finite_are_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_state(best=BestEpoch(epoch=1, step=3, accuracy=math.nan, loss=0.0)).to_json()


# --- hostile states

VALUES: list[Any] = [
    *(None, True, -1, 1.5, "x", [], {}, [[]], [1], {"a": 1}),
    *(math.nan, math.inf, 10**400, -(10**400), "\udcff"),
]
TEXT, NUMBER, MAPPING = {"x", "\udcff"}, {-1, 1.5}, {"{}", '{"a": 1}'}
IDENTITY_PATH: Path = ("run", "identity")
VALID: dict[Path, set[Any]] = {
    ("order_digest",): TEXT,
    ("best",): {None},
    ("best", "accuracy"): NUMBER,
    ("best", "loss"): NUMBER,
    ("metrics", "seconds"): NUMBER,
    ("metrics", "compute_seconds"): NUMBER,
    ("metrics", "rows", 0, 0): NUMBER,
    ("scaler",): {"{}"},
    ("run", "schedule"): MAPPING,
    ("run", "auto_resolved"): MAPPING,
    ("run", "versions"): {"{}"},
    ("run", "versions", "torch"): TEXT,
    (*IDENTITY_PATH, "architecture"): TEXT,
    (*IDENTITY_PATH, "data"): TEXT,
    **{(*IDENTITY_PATH, "classes", number): TEXT for number in range(len(IDENTITY.classes))},
    **{("scaler", key): NUMBER for key in SCALER},
}
"""Values that are valid at a path."""


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the paths of all values in JSON."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from paths(entry, (*path, key))


def edited(path: Path, *value: Any) -> str:
    """Return a state as JSON with another value at a path, or without that path."""
    content = json.loads(make_state().to_json())
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if value:
        parent[path[-1]] = value[0]
    else:
        del parent[path[-1]]
    return json.dumps(content)


def is_for_readers(path: Path) -> bool:
    return path[:2] in (("run", "schedule"), ("run", "auto_resolved")) and len(path) > 2


def is_valid(path: Path, value: Any) -> bool:
    if isinstance(value, dict | list):
        return json.dumps(value) in VALID.get(path, set())
    return any(value is one or (type(value) is type(one) and value == one) for one in VALID.get(path, set()))


PATHS = list(paths(json.loads(make_state().to_json())))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_invalid_and_missing_fields_are_refused(path: Path) -> None:
    for value in VALUES:
        text = edited(path, value)
        if is_for_readers(path) or is_valid(path, value):
            read(text)
            continue
        is_later_format = path == ("format",) and type(value) is int and value > FORMAT
        with pytest.raises(UserError if is_later_format else (ValueError, TypeError, KeyError)) as caught:
            read(text)
        assert str(caught.value), f"{path} as {value!r}"
    if is_for_readers(path) or (path[:2] == ("run", "versions") and len(path) > 2):
        read(edited(path))
    else:
        with pytest.raises((ValueError, TypeError, KeyError)):
            read(edited(path))


def test_unknown_fields_and_later_versions_are_refused() -> None:
    parents: list[Path] = [(), ("metrics",), ("best",), ("run",), IDENTITY_PATH, ("scaler",)]
    for parent in parents:
        with pytest.raises((ValueError, TypeError)):
            read(edited((*parent, "more"), 1))
    with pytest.raises(UserError, match=f"of format {FORMAT + 1}, written by a later version of regraft"):
        read(edited(("format",), FORMAT + 1))


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


# --- the identity of a run


def difference(**changes: Any) -> str:
    """Return what the error says about a checkpoint whose identity differs from IDENTITY."""
    other = dataclasses.replace(IDENTITY, **changes)
    copy.deepcopy(other).check_same(other, "itself")
    with pytest.raises(UserError) as caught:
        other.check_same(IDENTITY, "run/checkpoints/step-00000003-epoch-0001")
    first, *lines, last = str(caught.value).split("\n")
    assert first == "run/checkpoints/step-00000003-epoch-0001: a checkpoint of another run:"
    assert last.endswith("choose another run.dir, or --run.resume never, which archives the run")
    assert all(line.startswith("  ") for line in lines)
    return "\n".join(line[2:] for line in lines)


ANT, CAT, LINES, BROKEN = IDENTITY.classes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": "vgg\x1b11"}, "model: vgg\\x1b11 there, resnet18 now"),
        (
            {"classes": tuple(map(str, range(1000))), "examples": (1,) * 1000},
            "classes: 0, 1, 2, 3, 4 and 995 more only there, ant, 猫 🐈, two\\nlines, broken \\xff bytes only now",
        ),
        ({"classes": ("Ant", CAT, LINES, BROKEN)}, "classes: Ant only there, ant only now"),
        (
            {"classes": (*IDENTITY.classes, "wasp"), "examples": (4, 3, 2, 1, 9), "data": "more"},
            "classes: wasp only there, none only now",
        ),
        ({"classes": IDENTITY.classes[::-1], "examples": (1, 2, 3, 4)}, "classes: in another order"),
        (
            {"examples": (4, 3, 5, 7), "data": "other"},
            "training images: two\\nlines 5 there, 2 now, broken \\xff bytes 7 there, 1 now",
        ),
        ({"data": "other"}, "images: the same number of each class, but other files or another split"),
        (
            {"architecture": "vgg11", "classes": ("a", CAT, LINES, BROKEN), "examples": (4, 3, 3, 1)},
            "model: vgg11 there, resnet18 now\n"
            "classes: a only there, ant only now\n"
            "training images: two\\nlines 3 there, 2 now",
        ),
    ],
)
def test_differences_of_identity_are_listed(changes: dict[str, Any], expected: str) -> None:
    assert difference(**changes) == expected
