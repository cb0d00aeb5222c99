"""The examples of docs/serving.md answer as `regraft.load` does: in Python, in a browser and behind FastAPI."""

import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
import torch
from PIL import Image

import regraft
from regraft.contract import MODEL
from tests.browser import Browser, chromium
from tests.launching import REPOSITORY, free_port, run, wait_until
from tests.trainer.inference.models import write_images
from trainer.commands.export import main
from trainer.data.preprocessing import Preprocessing
from trainer.model.build import preset
from trainer.model.create import build_model
from trainer.model.metadata import ModelMetadata, write_model
from trainer.model.source_classes import ClassMapping

SERVING = REPOSITORY / "docs" / "serving.md"
NODE_MODULES = REPOSITORY / "tests" / "serving" / "node_modules"
LOGITS = """
const [names, done] = arguments;
const logits = async () => {
  const { computeLogits } = await import("/classify.js");
  const load = async (name) => (await fetch(name)).blob();
  return Promise.all(names.map(async (name) => [...(await computeLogits(await load(name)))]));
};
logits().then(done, (error) => done(String(error)));
"""
"""Script that returns the logits of images on the server."""
OUTPUT = "return document.querySelector('output').textContent"


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


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """Return a folder with the page, a pretrained model of ants and bees, and two photographs."""
    folder, data = tmp_path_factory.mktemp("photographs"), shared / "data" / "hymenoptera" / "val"
    weights = str(shared / "weights" / "squeezenet1_1-imagenet1k-fp16.safetensors")
    built = build_model(
        "squeezenet1_1", image_size=224, num_classes=2, weights=weights, head_init="source-labels",
        class_mapping=ClassMapping(targets=("ants", "bees"), aliases={}),
    )  # fmt: skip
    metadata = ModelMetadata(
        version="0", architecture="squeezenet1_1", classes=("ants", "bees"), source="", metrics={},
        preprocessing=Preprocessing(**dataclasses.asdict(preset("squeezenet1_1", None))),
    )  # fmt: skip
    write_model(folder / MODEL, built.model.state_dict(), metadata)
    options = ["--to", "onnx", "--preprocess", "--verify-data", str(data), "--verify-images", "8"]
    assert main([str(folder / MODEL), *options]) == 0
    for name in metadata.classes:
        shutil.copy(min((data / name).glob("*.jpg")), folder / f"{name}.jpg")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    for name, language in (("classify.js", "js"), ("index.html", "html")):
        (folder / name).write_text(example("onnxruntime-web in JavaScript", language), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


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
@pytest.mark.shared
def test_the_page_in_javascript_answers_as_regraft_for_photographs(photographs: Path, browser: Browser) -> None:
    model = regraft.load(photographs / MODEL)
    paths = sorted(photographs.glob("*.jpg"))
    with torch.inference_mode():
        expected = model.module(model.preprocess(paths))
    with file_server(photographs) as address:
        browser.driver.get(address)
        logits = browser.driver.execute_async_script(LOGITS, [path.name for path in paths])
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
        (prediction,) = model.predict(paths[0])
        file_input = browser.driver.find_element("css selector", "input")
        wait_until(file_input.is_enabled)
        file_input.send_keys(str(paths[0]))
        wait_until(lambda: browser.run(OUTPUT))
        assert browser.run(OUTPUT) == f"{prediction.label} ({100 * prediction.score:.1f} %)"


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serve the files of a folder, as `python3 -m http.server` does; yield the address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


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
