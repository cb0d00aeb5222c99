"""`regraft completion bash|zsh`: print a script that completes its commands.

For bash, add this line to ~/.bashrc:

    eval "$(regraft completion bash)"

For zsh, replace bash by zsh, and add the line to ~/.zshrc after compinit.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launch.errors import LaunchError
from launch.slurm.settings import RUNTIMES
from regraft.files import CONFIGS

SHELLS = ("bash", "zsh")
MODELS = "models"
"""`regraft completion models` lists the models: the script asks for them when they are needed, which takes seconds."""
CHECK = [
    *("--json", "--html", "--exclude-csv", "--groups-csv", "--fail-on", "--duplicates"),
    *("--model", "--weights", "--device"),
]
"""Options of `regraft check`, whose parser belongs to the trainer."""
PREDICT = [
    *("--output", "--topk", "--threshold", "--calibrated", "--tta", "--batch-size", "--sort-into", "--sort-mode"),
    *("--column", "--nproc", "--device"),
]
"""Options of `regraft predict`, whose parser belongs to the trainer."""
EVALUATE = ["--split", "--map", "--output", "--calibrate", "--unknown", "--store", "--batch-size", "--device"]
"""Options of `regraft evaluate`, whose parser belongs to the trainer."""
EXPORT = ["--to", "--output", "--preprocess", "--fp16", "--verify-data", "--verify-images", "--license"]
"""Options of `regraft export`, whose parser belongs to the trainer."""
_SCRIPT = """\
_regraft() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} option='' options='' values=''
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {verbs} -- "$word"))
        return
    fi
    # `--option value`, or `--option=value`, of which bash makes three words.
    option=${{COMP_WORDS[COMP_CWORD-1]}}
    if [ "$word" = = ]; then
        word=''
    elif [ "$option" = = ] && [ "$COMP_CWORD" -gt 2 ]; then
        option=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    case ${{COMP_WORDS[1]}} in
{options}
    *) options='' ;;
    esac
    case $option in
    --model.name)
        : "${{_REGRAFT_MODELS:=$({program} completion models 2>/dev/null)}}"
        values=$_REGRAFT_MODELS
        ;;
{values}
    *) values='' ;;
    esac
    case $word in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *)
        if [ -n "$values" ]; then
            COMPREPLY=($(compgen -W "$values" -- "$word"))
        else
            local IFS=$'\\n'
            COMPREPLY=($(compgen -f -- "$word"))
        fi
        ;;
    esac
}}
complete -o filenames -F _regraft regraft
"""


def render_script(shell: str, options: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> str:
    """Return the completion script of a shell.

    Args:
        shell: one of SHELLS.
        options: verb -> its options, with their dashes.
        values: option -> its values, of the options that have few of them.

    Raises:
        LaunchError: the shell is not supported.

    """
    if shell not in SHELLS:
        raise LaunchError(f"completion for {shell!r}: expected {' or '.join(SHELLS)}")
    script = _SCRIPT.format(
        verbs=shlex.quote(" ".join(options)),
        options=_cases(options, "options"),
        values=_cases(values, "values"),
        program=shlex.join([sys.executable, "-m", "regraft"]),
    )
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


def _cases(words: Mapping[str, Sequence[str]], variable: str) -> str:
    return "\n".join(f"    {key}) {variable}={shlex.quote(' '.join(own))} ;;" for key, own in words.items())


def parser_options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long options of a parser."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def trainer_options() -> tuple[list[str], dict[str, list[str]]]:
    """Return the trainer's options, and option -> values of those of any verb that have few values."""
    lines = _ask_trainer("from trainer.config.help import completions; print(*completions(), sep='\\n')").split("\n")
    values = {f"--{option}": words for option, *words in map(str.split, filter(None, lines))}
    general = ["--config", "--print_config", "--help", "--version"]
    strategies = sorted(path.stem for path in (CONFIGS / "strategies").glob("*.yaml"))
    few = {option: words for option, words in values.items() if words}
    few |= {"--transfer.strategy": strategies, "--strategies": strategies, "--container-runtime": list(RUNTIMES)}
    return [*general, *values], few


def models() -> list[str]:
    """Return the names of the models, which needs torchvision; those of timm if it is installed."""
    program = """
from torchvision import models
names = models.list_models(models)
try:
    import timm
except ImportError:
    pass
else:
    names += [f"timm/{name}" for name in timm.list_models()]
print(*names)
"""
    return _ask_trainer(program).split()


def _ask_trainer(program: str) -> str:
    """Return the output of a Python program: the launcher never imports the trainer."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
