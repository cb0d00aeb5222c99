import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn
from trainer.checkpoint.tensors import snapshot

from trainer.checkpoint import store
from trainer.checkpoint.resume import describe_resume, load_latest_checkpoint, restore_checkpoint
from trainer.checkpoint.state import BestEpoch, CheckpointState, RunIdentity
from trainer.checkpoint.store import CheckpointId, LoadedCheckpoint
from trainer.config.parse import dump
from trainer.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig, TransferConfig
from trainer.data.index import DatasetIndex, Example
from trainer.data.loader import EpochOrder
from trainer.data.prepare import Prepared
from trainer.errors import UserError
from trainer.metrics import MetricState
from trainer.run.folder import CHECKPOINTS, CONFIG, METRICS, MODEL, SPLIT, write_config
from trainer.run.versions import versions

ORDER = EpochOrder(examples=7, batch_size=4, seed=3)  # 2 steps an epoch
SUBJECT = RunIdentity(
    architecture="resnet18", classes=("a", "b", "图"), examples=(3, 2, 2), data="these images"
)
NEVER = "--run.resume never, which moves the run aside"


def prepared(*, split_made: bool = False) -> Prepared:
    index = DatasetIndex(
        root=Path("/data"),
        classes=SUBJECT.classes,
        train=tuple(Example(f"/data/{i}.png", 0) for i in range(7)),
        val=(),
        test=(Example("/data/t.png", 1),),
        reported="",
        split_made=split_made,
        notes=(),
    )
    return Prepared(index, ())


class Net(nn.Sequential):
    def __init__(self, seed: int, *, width: int = 2) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.optimizer = torch.optim.SGD(self.parameters(), momentum=0.9)
        for _ in range(2):
            self(torch.randn(2, 3, 2, 2)).square().sum().backward()
            self.optimizer.step()


@dataclass
class Run:
    """A run folder, and who looks into it."""

    folder: Path
    said: list[str] = field(default_factory=list)

    def config(self, **train: Any) -> Config:
        return Config(
            run=RunConfig(dir=str(self.folder), seed=3),
            data=DataConfig(root="/data"),
            model=ModelConfig(name="resnet18", weights=None),
            train=TrainConfig(**{"epochs": 4, "batch_size": 4, **train}),
        )

    def save(self, step: int, epoch: int, *, net: nn.Module | None = None, **changes: Any) -> Path:
        """Leave a checkpoint, whose state is changed at will."""
        write_config(self.folder, dump(self.config()))
        (self.folder / MODEL).write_text("the best")
        fields: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "sums": MetricState(rows=((1.0, 1, 4),), seconds=1.0, compute_seconds=1.0)
            if step > 2 * epoch
            else None,
            "best": BestEpoch(epoch=1, step=2, accuracy=0.5, loss=1.0) if epoch else None,
            "subject": SUBJECT,
            "seed": 3,
            "order": ORDER.digest(epoch),
            "steps_per_epoch": 2,
            "schedule": {"kind": "cosine", "warmup_steps": 0, "total_steps": 8, "lr_factor": 1.0},
            "scaler": {},
            "chosen": {"precision": "fp32", "channels_last": True},
            "world": 1,
            "threads": 1,
            "attempt": 1,
            "versions": versions(),
        }
        state = CheckpointState(**{**fields, **changes})
        net = net or Net(0)
        files = {name: save(held) for name, held in snapshot(net, net.optimizer).items()}  # type: ignore[arg-type]
        files |= {store.STATE: state.to_json(), store.METRICS: f"rows up to {step}\n".encode()}
        store.write(self.folder / CHECKPOINTS, CheckpointId(step, epoch), files, check=lambda: None)
        return self.folder / CHECKPOINTS / CheckpointId(step, epoch).name

    def find(
        self,
        *,
        config: Config | None = None,
        subject: RunIdentity = SUBJECT,
        order: EpochOrder = ORDER,
        split_made: bool = False,
        writes: bool = True,
    ) -> LoadedCheckpoint | None:
        return load_latest_checkpoint(
            config or self.config(),
            prepared(split_made=split_made),
            subject,
            order,
            log=self.said.append,
            writes=writes,
        )

    def refusal(self, **options: Any) -> str:
        """Return why there is no going on; nothing is lost."""
        before = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file() and p.name != CONFIG}
        with pytest.raises(UserError) as caught:
            self.find(**options)
        assert {
            p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file() and p.name != CONFIG
        } == before
        return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


# --- where it goes on


def test_a_new_run_begins_and_leaves_its_config_and_its_split(run: Run) -> None:
    assert run.find(split_made=True) is None
    assert {path.name for path in run.folder.iterdir()} == {CONFIG, SPLIT}
    assert run.said == []


def test_the_newest_checkpoint_is_found_whether_between_epochs_or_within_one(run: Run) -> None:
    for step, epoch in ((2, 1), (3, 1), (4, 1), (4, 2)):
        run.save(step, epoch)
        found = run.find()
        assert found is not None
        assert (found.state.step, found.state.epoch, found.metrics) == (step, epoch, f"rows up to {step}\n")
        assert found.path.name == CheckpointId(step, epoch).name
    assert not (run.folder / SPLIT).exists()
    assert run.said == []


def test_a_damaged_checkpoint_is_set_aside_with_a_line_and_the_one_before_it_is_used(run: Run) -> None:
    run.save(2, 1)
    damaged = run.save(4, 2)
    (damaged / store.MODEL).write_bytes((damaged / store.MODEL).read_bytes()[:-1])
    found = run.find()
    assert found is not None
    assert found.state.step == 2
    (line,) = run.said
    assert line.startswith(f"{damaged} is damaged (model.safetensors has ")
    assert line.endswith(f"set aside as damaged-1-{damaged.name}")


def test_where_none_is_whole_the_run_is_not_started_anew(run: Run) -> None:
    (run.save(2, 1) / store.STATE).unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint is whole; set aside: damaged-1-step-00000002-epoch-0001"
    ):
        run.find()
    with pytest.raises(UserError, match="no checkpoint is whole"):
        run.find()


def test_what_a_killed_start_has_left_half_done_is_cleared_away(run: Run) -> None:
    run.save(2, 1)
    halves = [
        run.folder / CHECKPOINTS / ".writing-step-00000004-epoch-0002-9",
        run.folder / CHECKPOINTS / ".leaving-step-00000001-epoch-0000",
    ]
    for half in halves:
        half.mkdir()
        (half / store.MODEL).touch()
    tmp = [run.folder / ".config.yaml.12ab.tmp", run.folder / f".{MODEL}.12ab.tmp"]
    for path in tmp:
        path.touch()
    (run.folder / ".notes.tmp").touch()
    found = run.find()
    assert found is not None
    assert found.state.step == 2
    assert not [path for path in [*halves, *tmp] if path.exists()]
    assert (run.folder / ".notes.tmp").exists()


def test_another_rank_looks_whether_it_sees_the_folder_and_leaves_the_choice_to_rank_0(run: Run) -> None:
    with pytest.raises(UserError, match="one folder that every machine shares"):
        run.find(writes=False)
    assert not run.folder.exists()
    (run.save(2, 1) / store.STATE).unlink()
    before = sorted(run.folder.rglob("*"))
    assert run.find(writes=False) is None
    assert sorted(run.folder.rglob("*")) == before


# --- what is refused, with the difference shown

OTHERS = {
    "model": (replace(SUBJECT, architecture="resnet34"), "model: resnet18 there, resnet34 now"),
    "classes": (
        replace(SUBJECT, classes=("a", "c", "图")),
        "classes: b only there, c only now",
    ),
    "fewer classes": (
        replace(SUBJECT, classes=("a", "b"), examples=(3, 2)),
        "classes: 图 only there, none only now",
    ),
    "their order": (
        replace(SUBJECT, classes=("b", "a", "图"), examples=(2, 3, 2)),
        "classes: in another order",
    ),
    "counts": (replace(SUBJECT, examples=(3, 4, 0)), "training images: b 2 there, 4 now, 图 2 there, 0 now"),
    "images": (
        replace(SUBJECT, data="others"),
        "images: as many to train on in each class, but not the same, or others to evaluate (names or split)",
    ),
    "everything": (
        RunIdentity(architecture="vgg11", classes=("a", "x"), examples=(1, 1), data="y"),
        "model: resnet18 there, vgg11 now\n  classes: b, 图 only there, x only now\n"
        "  training images: a 3 there, 1 now",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_something_else_is_refused(what: str, run: Run) -> None:
    subject, difference = OTHERS[what]
    path = run.save(2, 1)
    assert run.refusal(subject=subject) == (
        f"{path}: a checkpoint of something else:\n  {difference}\nBring back what it was trained on, choose another "
        "run.dir, or --run.resume never, which moves that run aside"
    )


@pytest.mark.parametrize("changes", [{"order": "0" * 64}, {"seed": 4}, {"order": ORDER.digest(0)}])
def test_another_order_of_the_examples_is_refused(changes: dict[str, Any], run: Run) -> None:
    path = run.save(3, 1, versions={"torch": "2.0\x1b[31m"}, **changes)
    text = run.refusal()
    assert text.startswith(f"{path}: the examples are drawn in another order here than where it was written")
    assert "by torch 2.0\\x1b[31m: go on with that version" in text
    assert text.endswith(NEVER)


def test_the_model_file_of_the_best_epoch_is_not_done_without(run: Run) -> None:
    run.save(3, 1)
    (run.folder / MODEL).unlink()
    assert run.find() is not None, "training may go on: it is made anew from the best epoch's checkpoint"


def test_a_checkpoint_beyond_the_run_is_refused(run: Run) -> None:
    # The config that was kept says nothing of it, as one that somebody has edited.
    path = run.save(6, 3)
    shorter = run.config(epochs=2)
    write_config(run.folder, dump(shorter))
    assert run.refusal(config=shorter) == (
        f"{path}: after 3 epochs of 2 steps, but this run is to have 2 of 2: choose another run.dir, or "
        "--run.resume never"
    )
    wider = run.config(batch_size=7)
    write_config(run.folder, dump(wider))
    text = run.refusal(config=wider, order=replace(ORDER, batch_size=7))
    assert "after 3 epochs of 2 steps, but this run is to have 4 of 1" in text


def test_a_run_may_be_extended_and_not_cut_short(run: Run) -> None:
    run.save(6, 3)
    assert run.find(config=run.config(epochs=9)) is not None
    with pytest.raises(UserError, match=r"train\.epochs: 9 there, 4 now"):
        run.find()


# --- putting everything back


def ctx(rank: int = 0, world_size: int = 1) -> Any:
    return SimpleNamespace(rank=rank, world_size=world_size)


ALONE = ctx()


def equal(one: nn.Module, other: nn.Module) -> bool:
    captured = [snapshot(net, net.optimizer) for net in (one, other)]  # type: ignore[arg-type]
    return all(
        captured[0][file].keys() == captured[1][file].keys()
        and all(torch.equal(captured[0][file][name], captured[1][file][name]) for name in captured[0][file])
        for file in captured[0]
    )


def back(run: Run, net: nn.Module, scaler: Any = None, ctx: Any = ALONE) -> UserError | None:
    found = run.find()
    assert found is not None
    return restore_checkpoint(found, net, net.optimizer, scaler, ctx=ctx)  # type: ignore[arg-type]


def test_model_and_moments_are_put_back(run: Run) -> None:
    saved, net = Net(1), Net(2)
    run.save(3, 1, net=saved)
    assert not equal(saved, net)
    assert back(run, net) is None
    assert equal(saved, net)


def test_a_checkpoint_that_does_not_fit_is_an_error_for_all_to_raise(run: Run) -> None:
    run.save(3, 1, net=Net(1, width=5))
    net = Net(2)
    error = back(run, net)
    assert error is not None
    assert "does not fit this run" in str(error)
    assert equal(net, Net(2)), "nothing was changed"


SCALER = {
    "scale": 512.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 17,
}


def test_loss_scaling_goes_on_where_there_was_some(run: Run) -> None:
    run.save(3, 1, scaler=SCALER)
    scaler = torch.amp.GradScaler("cpu")
    assert back(run, Net(2), scaler) is None
    assert scaler.state_dict() == SCALER
    assert back(run, Net(2)) is None, "and is left where there is none now"
    run.save(4, 2)
    assert back(run, Net(2), scaler) is None
    assert scaler.state_dict() == SCALER, "or was none then"


# --- what is said of it


def state(run: Run, step: int, epoch: int, **changes: Any) -> CheckpointState:
    run.save(step, epoch, **changes)
    found = run.find()
    assert found is not None
    return found.state


Said = Callable[..., list[str]]


@pytest.fixture
def said(run: Run) -> Said:
    def said(
        step: int,
        epoch: int,
        *,
        config: Config | None = None,
        ctx: Any = ALONE,
        **changes: Any,
    ) -> list[str]:
        return describe_resume(state(run, step, epoch, **changes), config or run.config(), ORDER, ctx)

    return said


def test_where_it_goes_on_is_said(said: Said) -> None:
    assert said(2, 1) == ["going on after epoch 1 of 4 (step 2)"]
    assert said(3, 1) == ["going on after epoch 1 of 4 (step 3), in epoch 2 after 1 of its 2 steps"]
    assert said(6, 2) == ["going on after epoch 2 of 4 (step 6), in epoch 3 after 2 of its 2 steps"]


@pytest.mark.parametrize(("batch_norm", "differs"), [("train", True), ("frozen", False), ("sync", False)])
def test_another_number_of_processes_is_said_with_what_it_changes(
    batch_norm: Any, differs: bool, said: Said, run: Run
) -> None:
    config = dataclasses.replace(run.config(), transfer=TransferConfig(batch_norm=batch_norm))
    sums = MetricState(rows=((1.0, 1, 2),) * 3, seconds=1.0, compute_seconds=1.0)
    _, line = said(3, 1, config=config, ctx=ctx(world_size=2), world_size=3, sums=sums)
    assert line == (
        "  on 2 processes instead of 3: the same examples, crops and learning rates; equal but for the "
        "order of sums, and the masks of dropout"
        + (", and BatchNorm, whose statistics belong to each process" if differs else "")
    )


def test_a_longer_schedule_is_said(said: Said, run: Run) -> None:
    _, line = said(2, 1, config=run.config(epochs=6))
    assert line == ("  for 12 steps instead of 8: from here on, the learning rate is that of the longer run")


def test_other_versions_are_said(said: Said) -> None:
    now = versions()
    _, line = said(2, 1, versions={**now, "torch": "2.0\n", "numpy": "1.0", "unheard-of": "3"})
    assert line == (
        "  with other versions, so equal but for what they changed: "
        f"torch 2.0\\n then, {now['torch']} now, numpy 1.0 then, {now['numpy']} now"
    )


def test_a_start_that_is_refused_leaves_the_config_as_it_was(run: Run) -> None:
    run.save(3, 1, subject=replace(SUBJECT, data="others"))
    before = (run.folder / CONFIG).read_bytes()
    assert "a checkpoint of something else" in run.refusal(config=run.config(epochs=9))
    assert (run.folder / CONFIG).read_bytes() == before


def test_the_config_in_the_folder_goes_on_when_it_is_run_again(run: Run) -> None:
    config = run.config()
    run.find(config=replace(config, run=replace(config.run, resume="never")))
    assert "resume: auto" in (run.folder / CONFIG).read_text()


def test_results_without_a_checkpoint_are_kept_under_another_name(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        write_config(run.folder, dump(run.config()))
        (run.folder / MODEL).write_text(f"model {number}")
        (run.folder / METRICS).write_text(f"rows {number}")
        assert run.find() is None
        assert run.said[-1].endswith(f"kept as earlier-{number}-{MODEL}")
        assert (run.folder / f"earlier-{number}-{MODEL}").read_text() == f"model {number}"
        assert (run.folder / f"earlier-{number}-{METRICS}").read_text() == f"rows {number}"
        assert not (run.folder / MODEL).exists()
