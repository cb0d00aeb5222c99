"""A real Slurm on this machine: munged, slurmctld and two slurmd, in a temporary folder, run by the user of the tests.

It has its own configuration, key, socket, ports and state, separate from a Slurm that may be installed here.
"""

import ctypes
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

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = "slurm-wlm munge"
NODES = ("node1", "node2")
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""States of a job that does not continue by itself."""
_MARK = "REGRAFT_TESTED_CLUSTER"
_TIMEOUT = 240.0
_FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")
_PR_SET_PDEATHSIG = 1

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
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(kw_only=True)
class Cluster:
    """A Slurm cluster of two nodes, both on this machine."""

    folder: Path
    environment: Mapping[str, str]
    """Environment of its users."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # Commands of a user.

    def call(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Run a command, check that it succeeds, and return its standard output."""
        done = self.run(*command, cwd=cwd, **environment)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(
        self, *command: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

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

    def state(self, job: str) -> str:
        return self.record(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.record(job)["Restarts"])

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

        def reached() -> bool:
            return {record["JobState"] for record in self.records(job)} == {state}

        self.wait(job, reached, f"job {job}: {state}")
        return self.records(job)[0]

    def diagnostics(self, job: str) -> str:
        """Return the record and output of a job, and the logs of the daemons."""
        parts = [f"== scontrol show job {job}", self.call("scontrol", "show", "job", job)]
        with suppress(ValueError):
            parts += ["== output", self.output(job)[-6000:]]
        return "\n".join([*parts, self._logs()])

    def _logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log"))
        )

    # Commands of an administrator, and accidents.

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, and wait until jobs may run on it."""
        self._start(name, "slurmd", "-D", "-N", name)
        self._until(lambda: self._node_state(name) in ("IDLE", "MIXED", "ALLOCATED"), f"{name} is ready")

    def _node_state(self, name: str) -> str:
        output = self.run("scontrol", "show", "node", "-o", name).stdout
        return dict(_FIELD.findall(output.strip())).get("State", "").split("+")[0]

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node, and all processes of jobs there."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for pid in self._processes_on(name):
            _kill(pid)

    def _processes_on(self, name: str) -> list[int]:
        """Return the processes of all jobs on a node, including Slurm's own for each step."""
        return [
            pid
            for pid, variables in self._processes().items()
            if variables.get("SLURMD_NODENAME") == name
            or (pid != self.daemons[name].pid and variables.get("NODE_OF_DAEMON") == name)
        ]

    def processes_of(self, job: str) -> dict[int, dict[str, str]]:
        """Return the living processes of a job, with their environment."""
        processes = self._processes().items()
        return {pid: variables for pid, variables in processes if variables.get("SLURM_JOB_ID") == job}

    def _processes(self) -> dict[int, dict[str, str]]:
        processes = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = _variables((path / "environ").read_bytes())
                if variables.get(_MARK) == self.environment[_MARK]:
                    processes[int(path.name)] = variables
        return processes

    def _start(self, name: str, program: str, *options: str) -> None:
        path = _which(program)
        assert path is not None
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *options],
                cwd=self.folder,
                env={**self.environment, "NODE_OF_DAEMON": name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_terminate_with_tests,  # noqa: PLW1509 (no thread of ours is running)
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
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "munged.log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        # --force: munged expects a folder that all users can read.
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._until((self.folder / "munge.socket").exists, "munged is ready")
        self._start("slurmctld", "slurmctld", "-D")
        self._until(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld is ready")
        for name in NODES:
            (self.folder / name).mkdir()
            self.start_node(name)

    def clear(self) -> None:
        """End all jobs, and restart nodes that are down."""
        self.call("scancel", "--user", _user())
        for name in NODES:
            for pid in self._processes_on(name):
                _kill(pid)
            if self.daemons[name].poll() is not None:
                self.start_node(name)

    def down(self) -> None:
        """End all jobs, all daemons, and all processes that remain."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.run("scancel", "--user", _user())
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in self._processes():
            _kill(pid)
        for daemon in self.daemons.values():
            daemon.wait()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name  # LOGNAME may differ


def _variables(environ: bytes) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in environ.decode(errors="replace").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _terminate_with_tests() -> None:
    """Have the kernel end a daemon when the tests end, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


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
                user=_user(),
                folder=folder,
                controller_port=ports[0],
                node_ports=",".join(map(str, ports[1:])),
                cpus=cpus,
                first_job=1000 + secrets.randbelow(60000),  # differs from other clusters on this machine
            ),
            encoding="ascii",
        )
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM", "SBATCH", "SRUN", "REGRAFT_"))
            },
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
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
    ports: set[int] = set()
    while len(ports) < count:
        port = 10000 + secrets.randbelow(10000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)
