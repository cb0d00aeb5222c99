"""Every way to start a run, what it leaves, and what it prints if it cannot start."""

import json
import sys
from pathlib import Path

import pytest
import yaml

import regraft
from tests.e2e.conftest import Options, Train
from tests.launching import MAIN, REPOSITORY, accelerate_launch, rows, run, torchrun


@pytest.mark.slow
def test_every_way_to_start_gives_the_same_run(options: Options, tmp_path: Path, train: Train) -> None:
    """tests/distributed/test_kills.py compares `python trainer/main.py`, `accelerate launch` and torchrun."""

    def arguments(name: str) -> list[str]:
        # Frozen BatchNorm is equal on one process and on two.
        return options(transfer__batch_norm="frozen", train__epochs=1, run__dir=tmp_path / name)

    outputs = {"main": train(0, arguments("main"))}
    for name, command, cwd in (
        ("python -m", [sys.executable, "-m", "trainer.main"], REPOSITORY),
        ("accelerate launch, 2", accelerate_launch("--multi_gpu", "--num_processes", 2, MAIN), tmp_path),
    ):
        outputs[name] = run([*command, *arguments(name)], cwd=cwd, environment={"ACCELERATE_USE_CPU": "true"})
    expected = [row["train_loss"] for row in rows(tmp_path / "main", "train")]
    for name, output in outputs.items():
        (epoch,) = rows(tmp_path / name, "epoch")
        assert (epoch["epoch"], epoch["train_seen"], epoch["test_seen"]) == (1, 22, 8), name
        assert "8 of 8 evaluated" in output, name
        assert output.count("run folder") == 1, f"{name}: several processes print"
        losses = [row["train_loss"] for row in rows(tmp_path / name, "train")]
        assert losses == pytest.approx(expected, rel=1e-5), name


def test_a_run_leaves_the_documented_files(options: Options, tmp_path: Path, train: Train) -> None:
    train(0, options(data__val_fraction=0.25))
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "model.safetensors", "checkpoints", "attempts", "environment", "curves.png",
        "split.csv", "images.json", "evaluation.json", "predictions.csv", "blocks.json", "report.html",
    }  # fmt: skip
    assert (folder / "checkpoints" / "LATEST").read_text() == "step-00000004-epoch-0002\n"
    checkpoint = folder / "checkpoints" / "step-00000004-epoch-0002"
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl", "MANIFEST.json",
    }  # fmt: skip
    assert (checkpoint / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    (attempt,) = (folder / "attempts").iterdir()
    record = json.loads(attempt.read_text())
    assert (attempt.name, record["state"], record["step"], record["steps"]) == ("0001.json", "done", 4, 4)
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert settings["data"]["mean"] == [0.485, 0.456, 0.406], "defaults of the weights are written out"
    keys = {"val_accuracy", "test_accuracy", "examples_per_sec", "examples_per_sec_compute"}
    assert keys <= rows(folder, "epoch")[0].keys()

    model, preprocess, classes = regraft.load(folder / "model.safetensors")
    assert classes == ("a b", "c", "图片")
    image = next((Path(settings["data"]["root"]) / "val" / "c").iterdir())
    assert model(preprocess(image)[None]).shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__root": "nowhere"}, ["data.root", "nowhere", "hotdog"]),
        ({"optim__lrr": 1}, ["optim.lrr", "Did you mean --optim.lr"]),
        ({"model__name": "resnet81"}, ["resnet81", "resnet18"]),
        ({"model__weights": "IMAGENET"}, ["IMAGENET", "IMAGENET1K_V1"]),
        ({"model__weights": "w.pth"}, ["w.pth"]),
        ({"data__image_size": 4, "model__name": "inception_v3"}, ["inception_v3", "4 x 4"]),
        ({"train__precision": "fp16"}, ["fp16", "CPU"]),
        ({"run__resume": "must"}, ["run.resume is must"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_reported_before_any_work(
    changes: dict[str, object], words: list[str], options: Options, tmp_path: Path, train: Train
) -> None:
    output = train(2, options(**changes))
    assert all(word in output for word in words), output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_wrong_option_is_reported_without_importing_torch() -> None:
    program = (
        "import sys, json; sys.argv = ['x', '--optim.lrr=1']\n"
        "from trainer.main import main\n"
        "print(json.dumps([main(), 'torch' in sys.modules]))"
    )
    output = run([sys.executable, "-c", program], cwd=REPOSITORY)
    assert json.loads(output.splitlines()[0]) == [2, False]


@pytest.mark.slow
def test_an_error_among_several_processes_is_printed_once(images: Path, options: Options, tmp_path: Path) -> None:
    broken, table = tmp_path / "broken.jpg", tmp_path / "data.csv"
    broken.write_bytes(b"no image")
    lines = ["path,label,split", f"{broken},c,train"]
    for split in ("train", "val"):
        lines += [f"{path},{path.parent.name},{split}" for path in sorted((images / split).rglob("*.png"))]
    table.write_text("\n".join(lines), encoding="utf-8")
    output = run([*torchrun(2, MAIN), *options(data__root=table)], cwd=tmp_path, code=1)  # torchrun's own code
    assert output.count("broken.jpg") == 1
    assert "Connection" not in output, "the other process must not report a lost peer"


def test_bf16_trains_on_a_cpu(options: Options, tmp_path: Path, train: Train) -> None:
    # Statistics of a batch of 8 would amplify small differences: frozen BatchNorm.
    changes = {"transfer__batch_norm": "frozen", "train__logs_per_epoch": 99}
    assert "precision bf16" in train(0, options(train__precision="bf16", **changes))
    assert "precision fp32" in train(0, options(run__dir=tmp_path / "fp32", **changes))
    bf16, fp32 = ([row["train_loss"] for row in rows(tmp_path / name, "train")] for name in ("run", "fp32"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.01)
