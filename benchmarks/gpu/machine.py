"""What the machine has, and what it lacks."""

import importlib.metadata
import importlib.util
import os
import platform

MODULES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "accelerate": "accelerate",
    "rich": "rich",
    "safetensors": "safetensors",
    "jsonargparse": "jsonargparse",
    "docstring_parser": "docstring-parser",  # with the next one: the extra `signatures` of jsonargparse
    "typeshed_client": "typeshed-client",
    "yaml": "PyYAML",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "packaging": "packaging",
    "PIL": "pillow",
    "pooch": "pooch",
    "platformdirs": "platformdirs",  # of pooch
}
"""Module that regraft needs -> package that has it."""
OPTIONAL = ("timm",)


def missing_packages() -> list[str]:
    """Return the packages that regraft needs and this Python does not have."""
    return [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]


def describe_machine(device: str) -> dict[str, object]:
    """Return versions and hardware.

    Raises:
        SystemExit: a GPU is asked for, and torch finds none.

    """
    import torch  # noqa: PLC0415 (it may be missing)

    versions = {}
    for name in (*MODULES.values(), *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine: dict[str, object] = {
        "device": device,
        "python": platform.python_version(),
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"torch {torch.__version__} finds no GPU here; --cpu tests the checks on a CPU")
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return machine
