"""A real Slurm on this machine: munged, slurmctld and two slurmd, in a temporary folder, as whoever runs the tests.

Nothing of a Slurm that may be installed here is touched: configuration, key, socket, ports and state are its own.
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
OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""States from which a job does not return by itself."""
_MARK = "REGRAFT_TESTED_CLUSTER"
_PATIENCE = 240.0
_FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")
_PR_SET_PDEATHSIG = 1

# cred_expire is what a requeued job waits for, in seconds; of two minutes, otherwise.
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
    """Return which of Slurm's programs this machine lacks."""
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(kw_only=True)
class Cluster:
    """A Slurm of two nodes, both on this machine."""

    folder: Path
    environment: Mapping[str, str]
    """What users of this cluster have set."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # What a user does.

    def call(
        self, *command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """Run a command as a user of this cluster; returns its standard output."""
        done = self.run(*command, cwd=cwd, environment=environment)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(
        self, *command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this cluster, whatever its exit code."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env={**self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def submit(self, *words: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
        """Submit by `sbatch`, from a folder; returns the job's id."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, environment=environment).strip()

    def records(self, job: str) -> list[dict[str, str]]:
        """Return what `scontrol show job` says of a job, for each task of an array."""
        said = self.call("scontrol", "show", "job", "-o", job)
        return [dict(_FIELD.findall(line)) for line in said.splitlines() if line.strip()]

    def record(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says of a job."""
        (found,) = self.records(job)
        return found

    def state(self, job: str) -> str:
        """Return a job's state."""
        return self.record(job)["JobState"]

    def restarts(self, job: str) -> int:
        """Return how often a job has been started again."""
        return int(self.record(job)["Restarts"])

    def output(self, job: str) -> str:
        """Return what a job has printed."""
        path = Path(self.record(job)["StdOut"])
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # Waiting.

    def wait(
        self,
        job: str,
        condition: Callable[[], object],
        what: str,
        *,
        also_after: bool = False,
        seconds: float = _PATIENCE,
    ) -> None:
        """Wait until something holds, while the job goes on, or even after its end."""
        until = time.monotonic() + seconds
        while True:
            over = not also_after and all(record["JobState"] in OVER for record in self.records(job))
            if condition():
                return
            if over or time.monotonic() > until:
                raise AssertionError(
                    f"{what}: {'the job is over' if over else f'not within {seconds:.0f} s'}\n{self.told(job)}"
                )
            time.sleep(0.1)

    def wait_for(self, job: str, state: str, *, seconds: float = _PATIENCE) -> dict[str, str]:
        """Wait until a job, or each task of an array, is in a state; returns its (first) record."""
        self.wait(
            job,
            lambda: {record["JobState"] for record in self.records(job)} == {state},
            f"job {job}: {state}",
            seconds=seconds,
        )
        return self.records(job)[0]

    def told(self, job: str) -> str:
        """Return all that there is to say of a job: its record, its output, the daemons' logs."""
        parts = [f"== scontrol show job {job}", self.call("scontrol", "show", "job", job)]
        with suppress(ValueError):
            parts += ["== its output", self.output(job)[-6000:]]
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            parts += [f"== {path.name}", *lines[-40:]]
        return "\n".join(parts)

    # What an administrator or an accident does.

    def start_node(self, name: str) -> None:
        """Start a node's daemon, and wait until jobs may run on it."""
        self._start(name, "slurmd", "-D", "-N", name)
        self._until(
            lambda: {"IDLE", "MIXED", "ALLOCATED"} >= {self.node_state(name)},
            f"{name}: ready",
        )

    def node_state(self, name: str) -> str:
        """Return a node's state without the flags that may follow it; `*` marks one that does not answer."""
        said = self.run("scontrol", "show", "node", "-o", name).stdout
        return dict(_FIELD.findall(said.strip())).get("State", "").split("+")[0]

    def kill_node(self, name: str) -> None:
        """Take a node away at one blow: its daemon, and all that runs there for its jobs."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for pid in self.on_node(name):
            _kill(pid)

    def on_node(self, name: str) -> list[int]:
        """Return the processes of all jobs on a node: Slurm's own for each step, and theirs."""
        return [
            pid
            for pid, variables in self._alive().items()
            if variables.get("SLURMD_NODENAME") == name
            or (pid != self.daemons[name].pid and variables.get("NODE_OF_DAEMON") == name)
        ]

    def processes_of(self, job: str) -> dict[int, dict[str, str]]:
        """Return the living processes of a job, with their environment."""
        return {
            pid: variables for pid, variables in self._alive().items() if variables.get("SLURM_JOB_ID") == job
        }

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
                preexec_fn=_end_with_tests,  # noqa: PLW1509 (no thread of ours is running)
            )

    def _until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition():
            ended = {name: daemon.returncode for name, daemon in self.daemons.items() if daemon.poll()}
            if ended or time.monotonic() > until:
                logs = "\n".join(
                    f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
                    for path in sorted(self.folder.glob("*.log"))
                )
                raise AssertionError(f"{what}: not within {seconds:.0f} s (ended: {ended})\n{logs}")
            time.sleep(0.1)

    def _alive(self) -> dict[int, dict[str, str]]:
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = _variables((path / "environ").read_bytes())
                if variables.get(_MARK) == self.environment[_MARK]:
                    found[int(path.name)] = variables
        return found

    def up(self) -> None:
        """Start all daemons."""
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "munged.log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        # --force: the folder is ours alone, which it thinks odd of a socket that serves all users.
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._until((self.folder / "munge.socket").exists, "munged: ready")
        self._start("slurmctld", "slurmctld", "-D")
        self._until(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld: ready")
        for name in NODES:
            (self.folder / name).mkdir()
            self.start_node(name)

    def clear(self) -> None:
        """End all jobs, and put up again what is down: the next test begins anew."""
        self.call("scancel", "--user", _user())
        for name in NODES:
            for pid in self.on_node(name):
                _kill(pid)
            if self.daemons[name].poll() is not None:
                self.start_node(name)

    def down(self) -> None:
        """End all jobs, then all daemons, then whatever of them is left."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.run("scancel", "--user", _user())
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in self._alive():
            _kill(pid)
        for daemon in self.daemons.values():
            daemon.wait()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name  # LOGNAME may be another's


def _variables(environ: bytes) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in environ.decode(errors="replace").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end_with_tests() -> None:
    """Have a daemon end when the tests do, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextmanager
def cluster(*, cpus: int) -> Iterator[Cluster]:
    """Start a cluster whose nodes pretend to have so many CPUs each; it is gone in the end, whatever happens."""
    with ExitStack() as stack:
        # Not pytest's folder: a Unix socket's path has room for some hundred characters.
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True))
        )
        (folder / "state").mkdir()
        ports = free_ports(3)
        (folder / "site.yaml").touch()  # not that of whoever runs the tests
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                user=_user(),
                folder=folder,
                controller_port=ports[0],
                node_ports=",".join(map(str, ports[1:])),
                cpus=cpus,
                first_job=1000 + secrets.randbelow(60000),  # another cluster here gives other numbers
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
    """Return so many ports that nobody has, below those that jobs and the kernel choose from."""
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(10000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found
