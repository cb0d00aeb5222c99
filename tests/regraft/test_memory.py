from pathlib import Path

import pytest

from regraft.memory import available_memory, total_memory

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 40\ntotal_active_file 60\n")
V2 = ("memory.max", "memory.current", "anon 1\ninactive_file 40\nactive_file 60\n")
HOST = (1024 * 1000, 1024 * 700)  # MemTotal and MemAvailable


@pytest.mark.parametrize(
    ("line", "folder", "names", "limit", "expected"),
    [
        ("0::/", "", V2, None, HOST),
        ("0::/job/step", "job/step", V2, "max", HOST),
        ("0::/job/step", "job/step", V2, "5000", (5000, 5000 - 300)),
        ("0::/job/step", "job", V2, "5000", (5000, 5000 - 300)),
        ("0::/job", "job", V2, "350", (350, 50)),
        ("0::/job", "job", V2, "250", (250, 0)),
        ("0::/../../host/path", "", V2, "5000", (5000, 5000 - 300)),
        ("4:memory:/job", "memory/job", V1, "5000", (5000, 5000 - 300)),
        ("4:cpu,memory:/job", "memory/job", V1, "5000", (5000, 5000 - 300)),
        ("4:memory:/job", "memory/job", V1, "9223372036854771712", HOST),
        ("4:cpu:/job", "memory/job", V1, "5000", HOST),
    ],
)
def test_the_memory_of_control_groups(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str], limit: str | None, expected: tuple[int, int]
) -> None:
    """The group uses 400 bytes, of which 100 are caches of files."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 700 kB\n")
    (proc / "self" / "cgroup").write_text(f"2:pids:/\n{line}\n")
    group = cgroup / folder
    group.mkdir(parents=True)
    if limit is not None:
        limit_name, used_name, stat = names
        (group / limit_name).write_text(f"{limit}\n")
        (group / used_name).write_text("400\n")
        (group / "memory.stat").write_text(stat)
    assert (total_memory(proc, cgroup), available_memory(proc, cgroup)) == expected
