"""Every way of starting a run, what it leaves, and what it says when it cannot start."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import regraft
from tests.e2e.conftest import Options
from tests.launching import MAIN, REPOSITORY, accelerate_launch, rows, run, torchrun
from trainer.main import main

COMMANDS = {
    "accelerate launch": (lambda: accelerate_launch("--num_processes", 1, MAIN), REPOSITORY, {}),
    "python": (lambda: [sys.executable, MAIN], None, {}),
    "python -m": (lambda: [sys.executable, "-m", "trainer.main"], REPOSITORY, {}),
    "torchrun": (lambda: torchrun(2, MAIN), None, {}),
    "accelerate launch, 2 processes": (
        lambda: accelerate_launch("--multi_gpu", "--num_processes", 2, MAIN),
        None,
        {"ACCELERATE_USE_CPU": "true"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_way_of_starting_gives_the_same_run(
    name: str, options: Options, tmp_path: Path, first_losses: dict[str, list[float]]
) -> None:
    command, folder, environment = COMMANDS[name]
    # Frozen BatchNorm: what two processes cannot have in common with one is left out.
    said = run(
        [*command(), *options(transfer__batch_norm="frozen")], cwd=folder or tmp_path, environment=environment
    )
    epochs = rows(tmp_path / "run", "epoch")
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert [row["train_seen"] for row in epochs] == [22, 22]
    assert [row["test_seen"] for row in epochs] == [8, 8]
    assert "8 of 8 evaluated" in said
    assert said.count("run folder") == 1, "one process speaks"
    losses = [row["train_loss"] for row in rows(tmp_path / "run", "train")]
    reference = first_losses.setdefault("losses", losses)
    assert losses == pytest.approx(reference, rel=1e-5)


@pytest.fixture(scope="module")
def first_losses() -> dict[str, list[float]]:
    return {}


@pytest.mark.slow
def test_a_run_leaves_all_that_is_promised_and_runs_again_from_its_config(
    options: Options, tmp_path: Path
) -> None:
    run([sys.executable, MAIN, *options(data__val_fraction=0.25)], cwd=tmp_path)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "model.safetensors", "checkpoints", "attempts", "environment", "curves.png",
        "split.csv",
    }  # fmt: skip
    assert (folder / "checkpoints" / "LATEST").read_text() == "step-00000004-epoch-0002\n"
    newest = folder / "checkpoints" / "step-00000004-epoch-0002"
    assert {path.name for path in newest.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl", "MANIFEST.json",
    }  # fmt: skip
    assert (newest / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    (attempt,) = (folder / "attempts").iterdir()
    record = json.loads(attempt.read_text())
    assert (attempt.name, record["state"], record["step"], record["steps"]) == ("0001.json", "done", 4, 4)
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert settings["data"]["mean"] == [0.485, 0.456, 0.406], "what was left to the weights is written out"
    epochs = rows(folder, "epoch")
    assert {"val_accuracy", "test_accuracy", "examples_per_sec", "examples_per_sec_compute"} <= epochs[
        0
    ].keys()

    model, preprocess, classes = regraft.load(folder / "model.safetensors")
    assert classes == ("a b", "c", "图片")
    picture = next((Path(settings["data"]["root"]) / "val" / "c").iterdir())
    assert model(preprocess(picture)[None]).shape == (1, 3)

    again = ["--config", folder / "config.yaml", "--run.dir", tmp_path / "again"]
    run([sys.executable, MAIN, *again], cwd=tmp_path)
    timed = ("seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes")
    first, second = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / name, "epoch")]
        for name in ("run", "again")
    )
    assert first == second
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "again")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.slow
def test_a_second_start_over_the_first(options: Options, tmp_path: Path) -> None:
    first = [sys.executable, MAIN, *options()]
    run(first, cwd=tmp_path)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    said = run(first, cwd=tmp_path)
    assert "finished already, after epoch 2" in said
    assert "test accuracy" in said, "the result is told again"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

    said = run([sys.executable, MAIN, *options(optim__lr=0.5)], cwd=tmp_path, code=2)
    assert "optim.lr: 0.001 there, 0.5 now" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

    said = run([*first, "--run.resume=never"], cwd=tmp_path)
    assert f"moved to {tmp_path / 'run.earlier-1'}" in said
    assert (tmp_path / "run.earlier-1" / "metrics.jsonl").read_bytes() == metrics
    assert len(rows(tmp_path / "run", "epoch")) == 2


@pytest.fixture
def _threads_are_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_are_restored")
def test_what_is_wrong_is_one_sentence_before_any_work(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = {
        "no such folder": (options(data__root=tmp_path / "nowhere"), ["data.root", "nowhere", "hotdog"]),
        "misspelt option": ([*options(), "--optim.lrr=1"], ["optim.lrr", "Did you mean optim.lr"]),
        "misspelt model": (options(model__name="resnet81"), ["resnet81", "resnet18"]),
        "wrong weights": (options(model__weights="IMAGENET"), ["IMAGENET", "IMAGENET1K_V1"]),
        "no such weights file": (options(model__weights="w.pth"), ["w.pth"]),
        "too small a size": (
            options(data__image_size=4, model__name="inception_v3"),
            ["inception_v3", "4 x 4"],
        ),
        "fp16 on a CPU": (options(train__precision="fp16", run__device="cpu"), ["fp16", "CPU"]),
        "must, but nothing there": ([*options(), "--run.resume=must"], ["run.resume is must"]),
    }
    for name, (arguments, words) in attempts.items():
        assert main(arguments) == 2, name
        printed = capsys.readouterr()
        said = printed.out + printed.err
        assert "Traceback" not in said, name
        for word in words:
            assert word in said, f"{name}: {said}"
        assert not list(tmp_path.rglob("*.safetensors")), name


@pytest.mark.slow
def test_without_a_network_pretrained_weights_are_asked_for_by_name(options: Options, tmp_path: Path) -> None:
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "torch")}
    said = run(
        [sys.executable, MAIN, *options(model__weights="DEFAULT")], cwd=tmp_path, code=2, environment=nowhere
    )
    assert "Traceback" not in said
    assert "https://download.pytorch.org/models/shufflenetv2_x0.5-" in said
    assert str(tmp_path / "torch") in said, "where to put the file"
    assert "model.weights" in said


@pytest.mark.slow
def test_an_error_among_several_processes_is_said_once(
    images: Path, options: Options, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to(images / part)
    bad = tmp_path / "more" / "broken.jpg"
    bad.parent.mkdir()
    bad.write_bytes(b"no image")
    table = tmp_path / "data.csv"
    lines = ["path,label,split", f"{bad},c,train"]
    for part in ("train", "val"):
        lines += [f"{path},{path.parent.name},{part}" for path in sorted((images / part).rglob("*.png"))]
    table.write_text("\n".join(lines), encoding="utf-8")
    said = run([*torchrun(2, MAIN), *options(data__root=table)], cwd=tmp_path, code=1)  # torchrun's own code
    assert said.count("broken.jpg") == 1
    assert "Connection" not in said, "the other process does not complain of a lost partner"


@pytest.mark.slow
def test_training_that_diverges_stops_with_the_step_and_the_files(options: Options, tmp_path: Path) -> None:
    arguments = options(optim__lr=1e30, optim__loss_reduction="sum", transfer__batch_norm="frozen")
    said = run([sys.executable, MAIN, *arguments], cwd=tmp_path, code=2)
    assert "the loss is not finite since step" in said
    assert said.count(".png") >= 8
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_bf16_trains_on_a_cpu_and_is_said(options: Options, tmp_path: Path) -> None:
    # Statistics of a batch of 8 would make much of little, and differently on each kind of CPU: frozen BatchNorm.
    settings = {"transfer__batch_norm": "frozen", "train__points_per_epoch": 99}
    said = run([sys.executable, MAIN, *options(train__precision="bf16", **settings)], cwd=tmp_path)
    assert "precision bf16: as train.precision asks" in said
    full = run([sys.executable, MAIN, *options(run__dir=tmp_path / "full", **settings)], cwd=tmp_path)
    assert "precision fp32" in full
    reduced, whole = (
        [row["train_loss"] for row in rows(tmp_path / name, "train")] for name in ("run", "full")
    )
    assert reduced != whole
    assert reduced == pytest.approx(whole, rel=0.01)


def test_a_wrong_option_is_answered_without_waiting_for_torch(tmp_path: Path) -> None:
    program = (
        "import sys, json; sys.argv = ['x', '--optim.lrr=1']\n"
        "from trainer.main import main\n"
        "print(json.dumps([main(), 'torch' in sys.modules]))"
    )
    said = run([sys.executable, "-c", program], cwd=REPOSITORY)
    assert json.loads(said.splitlines()[0]) == [2, False]
