"""Runs as Slurm jobs: writing and submitting the batch script, and what runs inside the job."""
