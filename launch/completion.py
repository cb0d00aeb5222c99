"""`regraft completion`: a script that lets bash and zsh complete verbs, options and files.

eval "$(regraft completion bash)"     # in ~/.bashrc; zsh: in ~/.zshrc, after compinit
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launch.errors import LaunchError

SHELLS = ("bash", "zsh")
_SCRIPT = """\
_regraft() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} options
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {verbs} -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    *) options='' ;;
    esac
    case $word in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *)
        local IFS=$'\\n'
        COMPREPLY=($(compgen -f -- "$word"))
        ;;
    esac
}}
complete -o filenames -F _regraft regraft
"""


def script(shell: str, verbs: Mapping[str, Sequence[str]]) -> str:
    """Return what the shell is to evaluate.

    Args:
        shell: one of SHELLS.
        verbs: verb -> its options, with their dashes.

    Raises:
        LaunchError: another shell.

    """
    if shell not in SHELLS:
        raise LaunchError(f"completion for {shell!r}: expected {' or '.join(SHELLS)}")
    cases = "\n".join(
        f"    {verb}) options={shlex.quote(' '.join(options))} ;;" for verb, options in verbs.items()
    )
    text = _SCRIPT.format(verbs=shlex.quote(" ".join(verbs)), cases=cases)
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long options of a parser."""
    return [
        option for action in parser._actions for option in action.option_strings if option.startswith("--")
    ]


def trainer_options() -> list[str]:
    """Return the trainer's options, asked of it: the launcher does not import it."""
    program = "from trainer.config.parse import keys; print(*keys())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return ["--config", "--print_config", "--help", *(f"--{key}" for key in found.split())]
