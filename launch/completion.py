"""`regraft completion bash|zsh`: print a script that completes verbs, options and file names.

For bash, add this line to ~/.bashrc; for zsh, replace bash by zsh and add it to ~/.zshrc, after compinit:

    eval "$(regraft completion bash)"
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


def render_script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """Return the completion script of a shell.

    Args:
        shell: one of SHELLS.
        options: verb -> its options, with their dashes.

    Raises:
        LaunchError: the shell is not supported.

    """
    if shell not in SHELLS:
        raise LaunchError(f"completion for {shell!r}: expected {' or '.join(SHELLS)}")
    cases = "\n".join(f"    {verb}) options={shlex.quote(' '.join(own))} ;;" for verb, own in options.items())
    script = _SCRIPT.format(verbs=shlex.quote(" ".join(options)), cases=cases)
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


def parser_options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long options of a parser."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def trainer_options() -> list[str]:
    """Return the trainer's options, listed by a separate process: the launcher never imports the trainer."""
    program = "from trainer.config.parse import keys; print(*keys())"
    keys = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return ["--config", "--print_config", "--help", *(f"--{key}" for key in keys.split())]
