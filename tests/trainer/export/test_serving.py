"""The examples of docs/serving.md answer as `regraft.load` does: in Python, in JavaScript and behind FastAPI."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

import regraft
from tests.launching import REPOSITORY, free_port, run
from tests.trainer.inference.models import write_images
from trainer.commands.export import main

SERVING = REPOSITORY / "docs" / "serving.md"
NODE_MODULES = REPOSITORY / "tests" / "serving" / "node_modules"
CLASSIFY = """
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";
import { PNG } from "pngjs";
import { classify } from "./classify.mjs";

const session = await ort.InferenceSession.create(readFileSync("runs/NAME/model.onnx"));
const { classes } = JSON.parse(readFileSync("runs/NAME/model.json", "utf8"));
for (const path of process.argv.slice(2)) {
  const { label, score } = await classify(session, classes, PNG.sync.read(readFileSync(path)));
  console.log(JSON.stringify([label, score]));
}
process.exit(0);  // the threads of WebAssembly would keep the process alive
"""


def example(heading: str, language: str) -> str:
    """Return the first code block below a heading."""
    section = SERVING.read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    block = re.search(rf"^```{language}\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model_file: Path, dataset: Path) -> Path:
    """Return a folder with an exported model and images of different sizes."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "runs" / "NAME").mkdir(parents=True)
    shutil.copy(model_file, folder / "runs" / "NAME")
    assert main([str(folder / "runs" / "NAME"), "--to", "onnx", "--preprocess", "--verify-data", str(dataset)]) == 0
    for number, path in enumerate(write_images(folder / "images", 6)):
        Image.open(path).save(folder / f"{number}.png")
    return folder


def answers(served: Path) -> dict[str, tuple[str, float]]:
    """Return image -> the class and probability that regraft predicts."""
    model = regraft.load(served / "runs" / "NAME")
    paths = sorted(served.glob("*.png"))
    found = {
        path.name: (prediction.label, prediction.score)
        for path, prediction in zip(paths, model.predict(list(paths)), strict=True)
    }
    assert len({label for label, _ in found.values()}) > 1
    return found


@pytest.mark.slow
def test_the_example_in_python_answers_as_regraft(served: Path) -> None:
    for name, (label, score) in answers(served).items():
        program = example("onnxruntime in Python", "python").replace("image.jpg", name)
        output = run([sys.executable, "-c", program], cwd=served, environment={"PYTHONPATH": ""})
        printed, _, probability = output.strip().rpartition(" ")
        assert (printed, float(probability)) == (label, pytest.approx(score, abs=1e-5))


@pytest.mark.slow
def test_the_example_in_javascript_answers_as_regraft(served: Path) -> None:
    if not shutil.which("node") or not NODE_MODULES.is_dir():
        pytest.skip("this test needs Node and its packages: npm install --prefix tests/serving")
    # A module finds its packages beside itself.
    (served / "node_modules").symlink_to(NODE_MODULES)
    (served / "classify.mjs").write_text(example("onnxruntime-web in JavaScript", "js"), encoding="utf-8")
    (served / "main.mjs").write_text(CLASSIFY, encoding="utf-8")
    expected = answers(served)
    output = run(["node", "main.mjs", *expected], cwd=served)
    printed = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert printed == [[label, pytest.approx(score, abs=1e-5)] for label, score in expected.values()]


@pytest.mark.slow
def test_the_handler_of_fastapi_answers_as_regraft(served: Path) -> None:
    (served / "server.py").write_text(example("FastAPI", "python"), encoding="utf-8")
    port = free_port()
    url = f"http://127.0.0.1:{port}/predict"
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=served, stderr=subprocess.PIPE, text=True) as server:
        try:
            for name, (label, score) in answers(served).items():
                response = post(url, (served / name).read_bytes(), server)
                assert response.json() == {"label": label, "score": pytest.approx(score, abs=1e-5)}
            assert post(url, b"no image", server).status_code == 400
        finally:
            server.terminate()


def post(url: str, content: bytes, server: "subprocess.Popen[str]") -> httpx.Response:
    """Send a file, as soon as the server accepts connections."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.post(url, files={"file": content}, timeout=30)
        except httpx.ConnectError:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
