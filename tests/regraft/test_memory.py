from pathlib import Path

from regraft.memory import available_memory

GIB = 1 << 30


def write_limit(group: Path, limit: object, *, used: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")


def test_memory_limits_of_containers_and_slurm_jobs_count(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\n")
    assert available_memory(proc, cgroup) == 8 * GIB, "no control groups"
    write_limit(cgroup, "max", used=5)
    assert available_memory(proc, cgroup) == 8 * GIB
    write_limit(cgroup, GIB, used=GIB // 2)
    assert available_memory(proc, cgroup) == 3 * GIB // 4, "the page cache can be freed"
    (proc / "self" / "cgroup").write_text("0::/slurm/job_1/step_0\n")
    write_limit(cgroup / "slurm" / "job_1", GIB // 2, used=GIB)
    write_limit(cgroup / "slurm" / "job_2", 1, used=1)
    write_limit(cgroup / "slurm" / "job_1" / "step_0", "max", used=GIB)
    assert available_memory(proc, cgroup) == GIB // 4
    assert available_memory() > 0
