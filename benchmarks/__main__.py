"""Run a benchmark: `python -m benchmarks NAME --help`."""

import argparse

from benchmarks import checkpoint, compare_peers, index, throughput

BENCHMARKS = {"peers": compare_peers, "throughput": throughput, "checkpoint": checkpoint, "index": index}


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of regraft.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    arguments = parser.parse_args()
    BENCHMARKS[arguments.benchmark].main(arguments)


if __name__ == "__main__":
    main()
