"""Print the folder that a training run with these options would use: `regraft train` asks for it before it starts."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import json
from collections.abc import Sequence

from regraft.contract import DEFAULT_RUN_DIR, ENVIRONMENT, latest_attempt_number
from trainer.config.dump import given_options
from trainer.config.parse import parse
from trainer.config.schema import Config
from trainer.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the folder to standard output and, if it is not the default one, the reason to standard error."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        default = Path(DEFAULT_RUN_DIR).absolute()
        if _was_started_with(config, default):
            print(default)
            return 0
        # These import torch, which takes seconds.
        from trainer.config.default_folder import default_run_folder  # noqa: PLC0415
        from trainer.config.resolve import resolve  # noqa: PLC0415

        folder, message = default_run_folder(config, resolve(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if message is not None:
        print(message, file=sys.stderr)
    print(folder)
    return 0


def _was_started_with(config: Config, folder: Path) -> bool:
    """Return whether the last start in a run folder had the same options, so that this command resumes it."""
    record = folder / ENVIRONMENT / f"{latest_attempt_number(folder):04}.json"
    try:
        options = json.loads(record.read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none, damaged, or of an earlier version
        return False
    return bool(options == given_options(config))


if __name__ == "__main__":
    sys.exit(main())
