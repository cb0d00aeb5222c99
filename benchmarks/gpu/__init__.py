"""The GPU part of the benchmarks: `benchmarks/gpu.sh`."""
