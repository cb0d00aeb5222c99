"""A real Slurm on this machine: munged, slurmctld and two slurmd, in a temporary folder, run by the user of the tests.

It has its own configuration, key, socket, ports and state, separate from a Slurm that may be installed here.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.slurm.allocation import is_port_free
from regraft.parent_death import signal_on_parent_death

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = ("node1", "node2")
ENDED = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")
"""States of a job that does not continue by itself."""
_MARK = "REGRAFT_TESTED_CLUSTER"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_USER = pwd.getpwuid(os.getuid()).pw_name  # LOGNAME may differ
_TIMEOUT = 240.0
_FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")

# A requeued job waits for cred_expire seconds, by default two minutes.
_CONFIGURATION = """\
ClusterName=regraft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldDebug=info
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
FirstJobId={first_job}
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} RealMemory=1000
PartitionName=normal Nodes=node[1-2] Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=60 PriorityTier=9 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return Slurm's programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@dataclass(kw_only=True)
class Cluster:
    """A Slurm cluster of two nodes, both on this machine."""

    folder: Path
    environment: Mapping[str, str]
    """Environment of its users."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def call(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Run a command, check that it succeeds, and return its standard output."""
        done = self.run(*command, cwd=cwd, **environment)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(
        self, *command: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
        variables = {**self.environment, **environment}
        return subprocess.run(list(map(str, command)), cwd=cwd or self.folder, env=variables, check=False, **options)

    def submit(self, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """Submit a job with `sbatch`, and return its id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip()

    def records(self, job: str) -> list[dict[str, str]]:
        """Return the fields of `scontrol show job`, for each task of an array."""
        output = self.call("scontrol", "show", "job", "-o", job)
        return [dict(_FIELD.findall(line)) for line in output.splitlines() if line.strip()]

    def record(self, job: str) -> dict[str, str]:
        (record,) = self.records(job)
        return record

    def output(self, job: str) -> str:
        path = Path(self.record(job)["StdOut"])
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self, job: str, condition: Callable[[], object], what: str, *, also_after_end: bool = False) -> None:
        """Wait until a condition holds, while the job is active or even after its end."""
        deadline = time.monotonic() + _TIMEOUT
        while True:
            ended = not also_after_end and all(record["JobState"] in ENDED for record in self.records(job))
            if condition():
                return
            if ended or time.monotonic() > deadline:
                reason = "the job has ended" if ended else f"not within {_TIMEOUT:.0f} s"
                raise AssertionError(f"{what}: {reason}\n{self.diagnostics(job)}")
            time.sleep(0.1)

    def wait_for(self, job: str, state: str) -> dict[str, str]:
        """Wait until a job, or each task of an array, is in a state; return the first record."""

        self.wait(job, lambda: {record["JobState"] for record in self.records(job)} == {state}, f"job {job}: {state}")
        return self.records(job)[0]

    def diagnostics(self, job: str) -> str:
        """Return the record and output of a job, and the logs of the daemons."""
        outputs = filter(Path.exists, (Path(record["StdOut"]) for record in self.records(job)))
        output = "\n".join(path.read_text(errors="replace")[-6000:] for path in outputs)
        return f"{self.call('scontrol', 'show', 'job', job)}\n== output\n{output}\n{self._logs()}"

    def _logs(self) -> str:
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, and wait until jobs may run on it."""

        def is_ready() -> bool:
            output = self.run("scontrol", "show", "node", "-o", name).stdout
            state = dict(_FIELD.findall(output.strip())).get("State", "")
            return state.split("+")[0] in ("IDLE", "MIXED", "ALLOCATED")

        self._start(name, "slurmd", "-D", "-N", name)
        self._until(is_ready, f"{name} is ready")

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node, and all processes of jobs there."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        self._kill_jobs(name)

    def _kill_jobs(self, node: str) -> None:
        """Kill the processes of all jobs on a node, including Slurm's own for each step."""
        for pid, variables in self._processes().items():
            is_on_node = node in (variables.get("SLURMD_NODENAME"), variables.get("NODE_OF_DAEMON"))
            if is_on_node and pid != self.daemons[node].pid:
                _kill(pid)

    def processes_of(self, job: str) -> dict[int, dict[str, str]]:
        """Return the living processes of a job, with their environment."""
        processes = self._processes().items()
        return {pid: variables for pid, variables in processes if variables.get("SLURM_JOB_ID") == job}

    def _processes(self) -> dict[int, dict[str, str]]:
        processes = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pairs = (path / "environ").read_text(encoding="utf-8", errors="replace").split("\0")
                variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if variables.get(_MARK) == self.environment[_MARK]:
                    processes[int(path.name)] = variables
        return processes

    def _start(self, name: str, program: str, *options: str) -> None:
        path = str(shutil.which(program, path=_PATH))
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *options],
                cwd=self.folder,
                env={**self.environment, "NODE_OF_DAEMON": name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal_on_parent_death(signal.SIGTERM),  # noqa: PLW1509 (no thread of ours is running)
            )

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            ended = {name: daemon.returncode for name, daemon in self.daemons.items() if daemon.poll()}
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within 60 s (ended: {ended})\n{self._logs()}")
            time.sleep(0.1)

    def up(self) -> None:
        """Start all daemons."""
        (self.folder / "munge.key-file").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge.key-file").chmod(0o600)
        files = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file", "key-file")]
        # --force: munged expects a folder that all users can read.
        self._start("munged", "munged", "--foreground", "--force", f"--log-file={self.folder}/daemon.log", *files)
        self._until((self.folder / "munge.socket").exists, "munged is ready")
        self._start("slurmctld", "slurmctld", "-D")
        self._until(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld is ready")
        for name in NODES:
            (self.folder / name).mkdir()
            self.start_node(name)

    def clear(self) -> None:
        """End all jobs, and restart nodes that are down."""
        self.call("scancel", "--user", _USER)
        for name in NODES:
            self._kill_jobs(name)
            if self.daemons[name].poll() is not None:
                self.start_node(name)

    def down(self) -> None:
        """End all jobs, all daemons, and all processes that remain."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.run("scancel", "--user", _USER)
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in self._processes():
            _kill(pid)
        for daemon in self.daemons.values():
            daemon.wait()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def cluster(*, cpus: int) -> Iterator[Cluster]:
    """Start a cluster whose nodes pretend to have this number of CPUs, and remove it at the end."""
    with ExitStack() as stack:
        # Not in pytest's folder: the path of a Unix socket is limited to about 100 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        (folder / "state").mkdir()
        ports = free_ports(3)
        (folder / "site.yaml").touch()  # instead of the user's own
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                user=_USER,
                folder=folder,
                controller_port=ports[0],
                node_ports=",".join(map(str, ports[1:])),
                cpus=cpus,
                first_job=1000 + secrets.randbelow(60000),  # differs from other clusters on this machine
            ),
            encoding="ascii",
        )
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "REGRAFT_"))},
            "PATH": f"{Path(sys.executable).parent}:{_PATH}",
            "VIRTUAL_ENV": sys.prefix,
            "REGRAFT_CACHE": str(folder / "cache"),
            "REGRAFT_SITE": str(folder / "site.yaml"),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONDONTWRITEBYTECODE": "1",
            _MARK: str(uuid.uuid4()),
        }
        made = Cluster(folder=folder, environment=environment)
        stack.callback(made.down)
        made.up()
        yield made


def free_ports(count: int) -> list[int]:
    """Return free ports below those that jobs and the kernel choose from."""
    candidates = secrets.SystemRandom().sample(range(10000, 20000), 100)
    return [port for port in candidates if is_port_free(port)][:count]
