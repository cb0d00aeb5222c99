"""Run a benchmark: `python -m benchmarks NAME --help`."""

import argparse
from importlib import import_module

BENCHMARKS = {
    "bars": "benchmarks.bars",
    "checkpoint": "benchmarks.checkpoint",
    "fingerprints": "benchmarks.fingerprints",
    "index": "benchmarks.index",
    "model-options": "benchmarks.model_options",
    "peers": "benchmarks.compare_peers",
    "predict": "benchmarks.predict",
    "resident": "benchmarks.resident",
    "startup": "benchmarks.startup",
    "step": "benchmarks.step",
    "throughput": "benchmarks.throughput",
}
"""Name -> module with `add_arguments(parser)` and `main(arguments)`; the first line of its docstring is its summary."""


def main() -> int | None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of regraft.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    modules = {name: import_module(module) for name, module in BENCHMARKS.items()}
    for name, module in modules.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name, help=summary, description=summary + "\n" + rest, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    arguments = parser.parse_args()
    code: int | None = modules[arguments.benchmark].main(arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
