"""Print the folder that a training run with these options would use: `regraft train` asks for it before it starts."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

from collections.abc import Sequence

from trainer.config.default_folder import default_run_folder
from trainer.config.parse import parse
from trainer.config.resolve import resolve
from trainer.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the folder to standard output and, if it is not the default one, the reason to standard error."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        folder, message = default_run_folder(config, resolve(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if message is not None:
        print(message, file=sys.stderr)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
