"""README, docs and configs: every command runs, every path and option exists, and the spelling is American.

A command that can run on a CPU in seconds runs on a small dataset, with small options appended. Of a command that needs
a GPU, Slurm, the network or real images, all options are checked, and the trainer's are parsed. A command that this
module does not know how to treat fails the test.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

import launch.cli
from tests.docs.pages import (
    CONFIGS,
    DEVELOPER_TOOLS,
    DOCUMENTS,
    REPOSITORY,
    code_blocks,
    commands,
    name,
    own_options,
    read,
    trainer_options,
)
from tests.folders import image_folder, noise_image
from tests.launching import run
from trainer.commands import check, compare, evaluate, export, lr_find, predict, preview, report, variants
from trainer.config.parse import keys, parse
from trainer.main import main as train

VERBS = {verb: f"trainer/commands/{verb.replace('-', '_')}.py" for verb in ("preview", "lr-find", "compare")}
"""Verb of `regraft` -> the program that it runs."""
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "trainer/main.py": train, VERBS["preview"]: preview.main, VERBS["lr-find"]: lr_find.main,
    VERBS["compare"]: compare.main,
}  # fmt: skip
OF_A_MODEL = {"predict": predict.main, "evaluate": evaluate.main, "report": report.main}
"""Verbs that use a run or its model -> what runs them."""
SMALL = [
    *("--data.root=images", "--data.image_size=32", "--data.num_workers=0", "--train.epochs=1"),
    *("--train.batch_size=8", "--run.threads=1", "--run.device=cpu"),
]
SMALL_MODEL = ["--model.name=shufflenet_v2_x0_5", "--model.weights=runs/NAME/model.safetensors"]
SMALL_OF_COMMAND = {"trainer/commands/lr_find.py": ["--steps=10"], "trainer/commands/compare.py": ["--seeds=1"]}
NEEDS_MORE = re.compile(r"hotdog|hymenoptera|quickstart|runs/pretrain")
"""Real images or weights, or more than seconds (the quickstart, which tests/e2e/test_quickstart.py runs)."""

BRITISH = re.compile(
    r"(?:(?<!strong-)(?:general|initial|maxim|memor|minim|normal|optim|organ|parallel|penal|quant|random|real|recogn|regular"
    r"|serial|special|stabil|standard|summar|synchron|token|util|vector|visual|capital|character|custom|emphas|final)"
    r"is(?:e(?![.\"\'])|ing|ation)|analys(?:e[ds]?|ing)\b|colour|behaviour|centre(?!d)|neighbour|favour|honour|\bgrey|labell|"
    r"modell|\blicence|\blearnt|spelt|spoilt|judgement|catalogue)",
    re.IGNORECASE,
)
"""Stems in British spelling. Error messages name old options: `regularise.` and `strong-regularisation`."""


@cache
def help_text(*command: str) -> str:
    """Return what `python COMMAND --help` prints."""
    return run([sys.executable, *command, "--help"], cwd=REPOSITORY)


def run_trainer(program: str, arguments: Sequence[str]) -> None:
    """Run a program of the trainer on small data, or check its options if it needs more."""
    options = trainer_options(arguments)
    parse(options)
    if program == "trainer/commands/compare.py":
        strategies = arguments[arguments.index("--strategies") + 1]
        weights = SMALL_MODEL if "WEIGHTS" in options else []
        variants.plan([*options, *weights, "--data.root=images"], variants.variants(strategies))
        if "--config" in arguments:  # the README's command runs; it would take a minute for all of them
            return
    if not arguments or NEEDS_MORE.search(" ".join(arguments)):
        for option in own_options(arguments):
            assert option in help_text(program), option
        return
    model = ["--model.weights=null"] if "--model.name" in arguments else SMALL_MODEL
    assert COMMANDS[program]([*arguments, *SMALL, *model, *SMALL_OF_COMMAND.get(program, [])]) == 0


def run_export(arguments: Sequence[str]) -> int:
    """Export a model again: the output must not exist."""
    target = arguments[arguments.index("--to") + 1]
    shutil.rmtree(Path(arguments[0], target), ignore_errors=True)
    for suffix in {"onnx": (".onnx", ".json"), "torch-export": (".pt2",)}.get(target, ()):
        Path(arguments[0], f"model{suffix}").unlink(missing_ok=True)
    return export.main(arguments)


def run_regraft(words: Sequence[str]) -> None:
    verb, arguments = words[0], words[1:]
    if verb in VERBS:
        # FOLDER is short for --data.root FOLDER, which the options of the small run replace.
        positional = [
            "--data.root=FOLDER" if word == "FOLDER" and not before.startswith("--") else word
            for before, word in pairwise(words)
        ]
        run_trainer(VERBS[verb], positional)
        return
    if verb in OF_A_MODEL or verb == "export":
        if verb == "predict" and "--output" in arguments:  # another document may name the same file
            Path(arguments[arguments.index("--output") + 1]).unlink(missing_ok=True)
        assert OF_A_MODEL.get(verb, run_export)(arguments) == 0
        return
    if verb == "check":
        assert check.main(arguments) in (0, 1)
        return
    parse(trainer_options(arguments))
    for option in own_options(arguments):
        assert option in help_text("-m", "launch.cli", verb), f"regraft {verb} has no {option}"
    # Training by `regraft train` and `--debug` is tested by the commands of the README.
    if verb == "status":
        assert launch.cli.main(["status", "runs/NAME", *arguments[1:]]) == 0
    elif verb == "submit":  # all but the submission
        assert launch.cli.main(["render", *arguments]) == 0
    else:
        assert verb in ("train", "debug", "doctor", "render"), f"regraft {verb}"


def check_command(words: list[str]) -> None:
    """Run a command, or check what can be checked of it here."""
    program, *arguments = [str(REPOSITORY / word) if word.startswith("configs/") else word for word in words]
    if program == "regraft":
        run_regraft(arguments)
    elif program == "salloc":
        check_command(words[words.index("regraft") :])
    elif program == "sbatch":
        script = next(word for word in arguments if word.startswith("slurm/"))
        assert (REPOSITORY / script).is_file(), script
        run_regraft(["submit", *(word for word in arguments if word != script)])
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(arguments[1:])
        run_trainer(launched.training_script, launched.training_script_args)
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(arguments)
        assert (REPOSITORY / launched.training_script).is_file()
        parse(trainer_options(launched.training_script_args))
    elif words[:3] == ["python", "-m", "benchmarks"]:
        text = help_text("-m", "benchmarks", arguments[2])
        for word in arguments[3:]:
            assert Path(word).suffix or word in text, f"{arguments[2]} has no {word}"
    elif program == "python":
        module = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        run_trainer(module, arguments[2:] if arguments[0] == "-m" else arguments[1:])
    else:
        assert program in DEVELOPER_TOOLS, f"this test does not know how to run {shlex.join(words)}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working folder with a small dataset, and what the documents call FOLDER, FILE and NAME."""
    folder = tmp_path_factory.mktemp("documents")
    image_folder(folder / "images", {"train": {"one": 6, "two": 6}, "val": {"one": 2, "two": 2}})
    for placeholder in ("FOLDER", "TARGET"):
        (folder / placeholder).symlink_to("images")
    for placeholder in ("FILE", "F"):
        (folder / placeholder).write_text("train: {batch_size: 8}\n", encoding="utf-8")
    (folder / "rates.txt").write_text("--optim.lr 1e-3\n--optim.lr 1e-4\n", encoding="utf-8")
    noise_image(0).save(folder / "image.jpg")
    return folder


@pytest.fixture
def _in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    if not (workplace / "runs/NAME/model.safetensors").exists():
        assert train([*SMALL, *SMALL_MODEL, "--model.weights=null", "--run.dir=runs/NAME"]) == 0
        timm_model = ["--model.name=timm/mobilenetv3_small_050", "--model.weights=null", "--data.image_size=64"]
        assert train([*SMALL, *timm_model, "--run.dir=runs/TIMM"]) == 0


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    """Return the commands of earlier documents: a command that several documents show runs once."""
    return set()


@pytest.mark.slow
@pytest.mark.usefixtures("_in_workplace")
@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=name)
def test_every_command_runs(document: Path, done: set[tuple[str, ...]]) -> None:
    shown = [words for words in commands(document) if tuple(words) not in done]
    done.update(map(tuple, shown))
    for number, words in enumerate(shown):
        own_folder = not {"--run.dir", "status"} & set(words) and bool(trainer_options(words))
        folder = f"runs/{document.stem}-{number}"
        check_command([*words, f"--run.dir={folder}"] if own_folder else words)
        shutil.rmtree(folder, ignore_errors=True)  # some have large models


@pytest.mark.slow
@pytest.mark.usefixtures("_in_workplace")
def test_regraft_train_of_the_readme_runs() -> None:
    command = ["regraft", "train", "FOLDER", "--transfer.strategy", "lp-ft"]
    assert command in [words[: len(command)] for words in commands(REPOSITORY / "README.md")]
    small = [*SMALL[1:], *SMALL_MODEL, "--run.dir=runs/regraft"]  # without --data.root: FOLDER is the dataset
    run([sys.executable, "-m", "launch.cli", *command[1:], *small], cwd=Path.cwd())


@pytest.mark.slow
@pytest.mark.usefixtures("_in_workplace")
def test_python_examples_run() -> None:
    examples = [code for document in DOCUMENTS for code in code_blocks(document, "python")]
    assert examples
    for words in commands(REPOSITORY / "docs" / "serving.md"):
        assert run_export(words[2:]) == 0
    for example in examples:
        exec(compile(example, "example", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_paths_and_options_exist(document: Path) -> None:
    text = read(document)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (document.parent / target).exists(), target
    for path in re.findall(r"`((?:\w+/)+(?:[\w-]+\.\w+)?)`", text):
        top = path.split("/")[0]
        if top != "runs" and (REPOSITORY / top).is_dir() and document.name != "CHANGELOG.md":
            assert (REPOSITORY / path).exists(), path
    options = set(keys())
    sections = {key.split(".")[0] for key in options} - {"debug"}
    for option in re.findall(rf"`(?:--)?((?:{'|'.join(sections)})\.\w+)", text):
        assert (
            option in options
            or option.endswith((".safetensors", ".csv", ".py", ".onnx", ".json", ".pt2"))
            or document.name == "CHANGELOG.md"
        ), option
    for verb in re.findall(r"`regraft ([a-z][a-z-]*)", text):
        assert re.search(rf"^  {verb}\b", help_text("-m", "launch.cli"), flags=re.MULTILINE), f"regraft {verb}"


def test_the_files_of_the_architecture_page_exist() -> None:
    layout = next(block for block in code_blocks(REPOSITORY / "docs/architecture.md", "") if "  main.py  " in block)
    root = ""
    for line in layout.splitlines():
        files = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            root = files[0]
            assert (REPOSITORY / root).is_dir(), root
        else:
            for file in files:
                assert (REPOSITORY / root / file).exists(), f"{root}{file}"


def test_spelling_is_american() -> None:
    folders = ("benchmarks", "configs", "docs", "launch", "regraft", "slurm", "tests", "trainer")
    paths = [*REPOSITORY.glob("*"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*"))]
    kinds = (".md", ".py", ".yaml", ".toml", ".sh")
    files = [path for path in paths if path.suffix in kinds and "node_modules" not in path.parts]
    british = [
        f"{name(path)}:{number}: {match[0]}"
        for path in files
        if path != Path(__file__).resolve()
        for number, line in enumerate(read(path).splitlines(), start=1)
        # The changelog names old options and files.
        for match in BRITISH.finditer(re.sub("`[^`]*`", "", line) if path.name == "CHANGELOG.md" else line)
    ]
    assert british == []
