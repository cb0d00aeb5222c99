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
import torch

from trainer.checkpoint.state import BestEpoch, CheckpointState, RunIdentity
from trainer.errors import UserError
from trainer.metrics import MetricState

STEPS_PER_EPOCH = 3
SUBJECT = RunIdentity(
    architecture="resnet18",
    classes=("ant", "猫 🐈", "two\nlines", "broken \udcff bytes"),
    examples=(4, 3, 2, 1),
    data="5e3a",
)
SCALER = {
    "scale": 1024.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 3,
}


def state(step: int = 4, epoch: int = 1, **changes: Any) -> CheckpointState:
    """Return a state of a run whose epochs have three steps; within an epoch it has sums."""
    begun = step - epoch * STEPS_PER_EPOCH
    fields: dict[str, Any] = {
        "epoch": epoch,
        "step": step,
        "sums": MetricState(rows=((0.1 * step, 1, 4),), seconds=1.5, compute_seconds=0.7) if begun else None,
        "best": BestEpoch(epoch=1, step=3, accuracy=0.1 + 0.2, loss=1 / 3),
        "subject": SUBJECT,
        "seed": 2**63 - 1,
        "order": "0f" * 32,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "schedule": {"kind": "cosine", "warmup_steps": 1, "total_steps": 9, "lr_factor": 0.3},
        "scaler": SCALER,
        "chosen": {"precision": "fp16", "channels_last": True},
        "world": 1,
        "threads": 2,
        "attempt": 1,
        "versions": {"torch": "2.11"},
    }
    return CheckpointState(**fields | changes)


def read(written: CheckpointState | str) -> CheckpointState:
    return CheckpointState.from_json(written if isinstance(written, str) else written.to_json().decode())


# Round trips


@pytest.mark.parametrize(
    "written",
    [
        state(),
        state(3, 1),
        state(3, 0),
        state(0, 0, best=None, scaler={}, seed=0),
        state(2**40 * STEPS_PER_EPOCH, 2**40),
        state(
            4,
            1,
            world_size=2,
            sums=MetricState(rows=((1e-320, 0, 2**62), (7, 0, 0)), seconds=0.0, compute_seconds=0.0),
        ),
    ],
)
def test_a_state_comes_back_as_it_was(written: CheckpointState) -> None:
    assert read(written) == written


def test_a_state_is_text_that_any_tool_reads() -> None:
    written = state().to_json()
    assert written.isascii()
    assert written.endswith(b"}\n")
    assert json.loads(written)["subject"]["classes"] == list(SUBJECT.classes)


def test_class_names_that_are_no_unicode_text_come_back() -> None:
    names = ("\udcff", "\udc80\udcfe", "a\udcffb", "\ud7ff", "\U0010ffff", "\0", '"\\', "e\u0301", "é", "")
    subject = dataclasses.replace(SUBJECT, classes=names, examples=(1,) * len(names))
    assert read(state(subject=subject)).subject.classes == names
    in_bytes = [os.fsencode(name) for name in names if not name.startswith("\ud7ff")]
    assert in_bytes[:2] == [b"\xff", b"\x80\xfe"], "as a folder has them"


def test_floats_come_back_bit_for_bit() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    drawn = random.Random(seed)
    values = [0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1 + 0.2, 1 / 3]
    while len(values) < 2000:
        (value,) = struct.unpack("<d", drawn.randbytes(8))
        if math.isfinite(value):
            values.append(value)
    rows = tuple((value, 0, 0) for value in values)
    sums = MetricState(rows=rows, seconds=values[8], compute_seconds=values[9])
    best = BestEpoch(epoch=1, step=3, accuracy=values[10], loss=values[11])
    found = read(state(4, 1, sums=sums, world_size=len(rows), best=best))

    def bits(state: CheckpointState) -> list[bytes]:
        assert state.sums is not None
        assert state.best is not None
        numbers = [row[0] for row in state.sums.rows]
        numbers += [state.sums.seconds, state.sums.compute_seconds, *state.best.score]
        return [struct.pack("<d", number) for number in numbers]

    assert bits(found) == bits(state(4, 1, sums=sums, world_size=len(rows), best=best))


def test_the_state_of_the_loss_scaling_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(dict(read(state(scaler=scaler.state_dict())).scaler))
    assert other.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_no_json_can_hold_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        state(best=BestEpoch(epoch=1, step=3, accuracy=value, loss=0.0)).to_json()


# What is refused

VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    "x",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    math.nan,
    math.inf,
    10**400,
    -(10**400),
    "\udcff",
]
TEXT = {"x", "\udcff"}
NUMBER = {-1, 1.5}
ANY_MAPPING = {"{}", '{"a": 1}'}
FITTING: dict[tuple[str | int, ...], set[Any]] = {
    ("format",): {True},  # equal to 1
    ("order",): TEXT,
    ("best",): {None},
    ("best", "accuracy"): NUMBER,
    ("best", "loss"): NUMBER,
    ("sums", "seconds"): NUMBER,
    ("sums", "compute_seconds"): NUMBER,
    ("sums", "rows", 0, 0): NUMBER,
    ("subject", "architecture"): TEXT,
    ("subject", "data"): TEXT,
    ("schedule",): ANY_MAPPING,
    ("chosen",): ANY_MAPPING,
    ("scaler",): {"{}"},
    ("versions",): {"{}"},
    ("versions", "torch"): TEXT,
    **{("subject", "classes", number): TEXT for number in range(len(SUBJECT.classes))},
    **{("scaler", key): NUMBER for key in SCALER},
}
"""Where some of the values do fit."""


def fields_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Return where there are values in JSON, at any depth."""
    if path:
        yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from fields_of(entry, (*path, key))


def changed(path: tuple[str | int, ...], value: Any) -> str:
    """Return a state as JSON with one field changed."""
    content = json.loads(state().to_json())
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return json.dumps(content)


def fits(path: tuple[str | int, ...], value: Any) -> bool:
    if path[0] in ("schedule", "chosen") and len(path) > 1:
        return True  # for readers: whatever they hold
    fitting = FITTING.get(path, set())
    if isinstance(value, dict | list):
        return json.dumps(value) in fitting
    return any(value is one or (type(value) is type(one) and value == one) for one in fitting)


FIELDS = list(fields_of(json.loads(state().to_json())))


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_value_in_any_field_is_refused(path: tuple[str | int, ...]) -> None:
    for value in VALUES:
        text = changed(path, value)
        if fits(path, value):
            read(text)
            continue
        with pytest.raises((ValueError, TypeError, KeyError, UserError)) as caught:
            read(text)
        assert str(caught.value), f"{path} as {value!r}"
        assert isinstance(caught.value, UserError) == (
            path == ("format",) and type(value) is int and value > 1
        )


def test_a_later_version_is_named_rather_than_its_checkpoint_called_damaged() -> None:
    with pytest.raises(UserError, match="format 2, by a later regraft than this one, which reads 1"):
        read(changed(("format",), 2))


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_field_is_refused(path: tuple[str | int, ...]) -> None:
    content = json.loads(state().to_json())
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    if path[0] in ("schedule", "chosen", "versions") and len(path) > 1:
        read(json.dumps(content))
        return
    with pytest.raises((ValueError, TypeError, KeyError)):
        read(json.dumps(content))


@pytest.mark.parametrize("where", [(), ("sums",), ("best",), ("subject",), ("scaler",)])
def test_a_field_that_is_none_of_ours_is_refused(where: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, TypeError)):
        read(changed((*where, "more"), 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"format"',
        "{}",
        "[" * 100_000,
        '{"format": 1, "step": ' * 20_000,
        '{"format": ' + "9" * 100_000 + "}",
        '{"format": 0}',
        '{"format": NaN}',
        "\0" * 100,
    ],
)
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError)):
        read(text)


@pytest.mark.parametrize(
    ("step", "epoch", "sums"),
    [
        (2, 1, None),  # before the epoch's begin
        (7, 1, state().sums),  # beyond its end
        (4, 1, None),
        (3, 1, state().sums),
        (3, 0, None),
        (2**63, 2**63 // 3, state().sums),
    ],
)
def test_counters_that_contradict_one_another_are_refused(
    step: int, epoch: int, sums: MetricState | None
) -> None:
    with pytest.raises(ValueError, match="its state does not make sense"):
        read(state(step, epoch, sums=sums))


@pytest.mark.parametrize("changes", [{"world": 2}, {"world": 0}, {"steps_per_epoch": 0}])
def test_sums_of_other_processes_and_empty_epochs_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="its state does not make sense"):
        read(state(**changes))


# What a checkpoint belongs to


def refusal(**changes: Any) -> str:
    """Return why a checkpoint of another subject is refused, by a run of SUBJECT."""
    there = dataclasses.replace(SUBJECT, **changes)
    copy.deepcopy(there).check_same(there, "itself")
    with pytest.raises(UserError) as caught:
        there.check_same(SUBJECT, "run/checkpoints/step-00000003-epoch-0001")
    first, *lines, last = str(caught.value).split("\n")
    assert first == "run/checkpoints/step-00000003-epoch-0001: a checkpoint of something else:"
    assert last == (
        "Bring back what it was trained on, choose another run.dir, or --run.resume never, which moves that run aside"
    )
    assert all(line.startswith("  ") for line in lines)
    return "\n".join(line[2:] for line in lines)


def test_another_model_is_told() -> None:
    assert refusal(architecture="vgg\x1b11") == "model: vgg\\x1b11 there, resnet18 now"


def test_classes_that_have_come_and_gone_are_told() -> None:
    ant, cat, lines, broken = SUBJECT.classes
    assert refusal(classes=("Ant", cat, lines, broken)) == "classes: Ant only there, ant only now"
    assert (
        refusal(classes=(*SUBJECT.classes, "wasp"), examples=(4, 3, 2, 1, 9), data="more")
        == "classes: wasp only there, none only now"
    )
    assert (
        refusal(classes=(ant, cat), examples=(4, 3))
        == "classes: none only there, two\\nlines, broken \\xff bytes only now"
    )
    many = tuple(f"class {number}" for number in range(1000))
    told = refusal(classes=many, examples=(1,) * 1000)
    assert told.startswith(
        "classes: class 0, class 1, class 2, class 3, class 4 and 995 more only there, ant, "
    )


def test_another_order_of_the_classes_is_told() -> None:
    order = SUBJECT.classes[::-1]
    assert refusal(classes=order, examples=SUBJECT.examples[::-1]) == "classes: in another order"


def test_other_counts_are_told() -> None:
    assert refusal(examples=(4, 3, 5, 7), data="other") == (
        "training images: two\\nlines 5 there, 2 now, broken \\xff bytes 7 there, 1 now"
    )


def test_other_images_in_the_same_counts_are_told() -> None:
    assert refusal(data="other") == (
        "images: as many to train on in each class, but not the same, or others to evaluate (names or split)"
    )


def test_all_that_differs_is_told_at_once() -> None:
    told = refusal(architecture="vgg11", classes=("a", *SUBJECT.classes[1:]), examples=(4, 3, 3, 1))
    assert told.split("\n") == [
        "model: vgg11 there, resnet18 now",
        "classes: a only there, ant only now",
        "training images: two\\nlines 3 there, 2 now",
    ]


def test_the_same_subject_is_taken() -> None:
    read(state()).subject.check_same(SUBJECT, "")


def test_of_two_epochs_the_better_is_the_more_accurate_then_the_one_of_lower_loss() -> None:
    worst, middle, best = (
        BestEpoch(epoch=1, step=1, accuracy=accuracy, loss=loss)
        for accuracy, loss in [(0.5, 0.1), (0.6, 0.9), (0.6, 0.8)]
    )
    assert worst.score < middle.score < best.score
