"""Choose the run folder of a run without `run.dir`."""

from pathlib import Path

from regraft.contract import DEFAULT_RUN_DIR
from trainer.config.dump import dump
from trainer.config.resolve import ResolvedConfig
from trainer.config.schema import Config
from trainer.run.folder import choose_folder


def default_run_folder(config: Config, resolved: ResolvedConfig) -> tuple[str, str | None]:
    """Return the run folder, and a line to print if it is not the default one.

    Without `run.dir`, it is the first of `runs/default`, `runs/default-2`, ... that holds no run or a run of the same
    options. So the same command resumes its run, and a command with other options starts another one.
    """
    if config.run.dir != DEFAULT_RUN_DIR or config.debug:
        return resolved.run.dir, None
    folder, message = choose_folder(Path(resolved.run.dir), dump(resolved))
    return str(folder), message
