"""Train with deterministic algorithms and without TF32: `python -m benchmarks.gpu.deterministic OPTIONS...`."""

import os

os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVIDIA_TF32_OVERRIDE": "0"}  # read when CUDA starts

import torch

from trainer.cli import exit_after
from trainer.main import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    exit_after(main)
