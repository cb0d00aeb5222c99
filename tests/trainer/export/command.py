"""The command `regraft export` in this process."""

from pathlib import Path

from trainer.commands.export import main


def export(model: Path, to: str, output: Path, data: Path, *options: str) -> int:
    """Export a model, verified on a folder of images; return the exit code."""
    return main([str(model), "--to", to, "--output", str(output), "--verify-data", str(data), *options])
