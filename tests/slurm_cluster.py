"""A real Slurm on one machine: two virtual nodes with two pretended GPUs each, everything in one folder, as any user.

By hand, for instance to follow docs/cluster.md without a cluster:

    python tests/slurm_cluster.py start /tmp/slurm     # prints the line to type: export SLURM_CONF=/tmp/slurm/slurm.conf
    python tests/slurm_cluster.py stop /tmp/slurm

Needs Debian's packages slurm-wlm and munge (22.05 and newer). Nothing of a Slurm that is installed already is touched: own
configuration, ports, key and sockets, all on the loopback interface. Both nodes have the address 127.0.0.1, and their names
resolve nowhere: what runs in a job takes addresses from Slurm.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

NODES = ("node1", "node2")
GPUS = 2
CPUS = 8  # more than there are, so that two jobs fit a node
READY_S = 30.0

# A requeued job waits as long as its credentials live, 120 s if nothing is said. Not shorter by `scontrol update StartTime=now`: its
# new start may then be taken for the old one, which ended, and fail.
CONFIGURATION = """\
ClusterName=deepscale
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=6
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=15
MinJobAge=3600
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=NO
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "mungekey", "srun", "sbatch") if program(name) is None]
    return f"{', '.join(lacking)} not found: apt-get install slurm-wlm munge" if lacking else None


def program(name: str) -> str | None:
    """The path of a program; Debian's daemons lie where only root looks."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


class Cluster:
    """A cluster in a folder. `environment` is what its users need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @property
    def environment(self) -> dict[str, str]:
        """What points Slurm's commands to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Starts munge, the controller and both nodes, and waits until they are idle. Raises RuntimeError with the logs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("state", "munge", *NODES):
            (self.folder / name).mkdir(exist_ok=True, mode=0o755)
        self._write()
        self._start_munge()
        self._daemon("slurmctld", "-i")
        for node in NODES:
            self.start_node(node)
        limit = time.monotonic() + READY_S
        while not self.idle():
            if time.monotonic() > limit:
                logs = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.folder.glob("*.log"))
                self.stop()
                raise RuntimeError(f"the cluster is not ready after {READY_S:.0f} s\n{logs}")
            time.sleep(0.1)

    def start_node(self, node: str) -> None:
        """Starts a node's daemon."""
        self._daemon("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """A node that dies: its daemon and all that runs on it end at once, without a word to the controller."""
        wanted = (f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}")
        tasks: list[int] = []
        steps: dict[int, None] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "environ").read_text(errors="replace").split("\0")
                if all(word in words for word in wanted):
                    tasks.append(int(entry.name))
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                        steps[parent] = None
        for pid in [*self._pids(f"{node}.pid"), *steps, *tasks]:  # the daemons first, so that none tells of the end of a task
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends all jobs and daemons. The folder stays."""
        self.command("scancel", "--full", "--user", _user(), check=False)
        limit = time.monotonic() + 10
        while self.command("squeue", "-h", check=False).strip() and time.monotonic() < limit:
            time.sleep(0.2)
        for name in (*(f"{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            for pid in self._pids(name):
                _end(pid)

    def idle(self) -> bool:
        """Whether both nodes are there and free."""
        return self.command("sinfo", "-h", "-N", "-p", "normal", "-o", "%T", check=False).split() == ["idle"] * len(NODES)

    def command(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Output of one of Slurm's commands. Raises RuntimeError with its message where it fails."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, cwd=cwd, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout or done.stderr  # sbatch --test-only answers on the second

    def _write(self) -> None:
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} "
            f"ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        values = {"folder": self.folder, "host": host, "user": _user(), "port": ports[0], "nodes": nodes}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Plain files in the place of devices: jobs are given GPUs, and torch finds none.
        for index in range(GPUS):
            (self.folder / f"gpu{index}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")

    def _start_munge(self) -> None:
        place = self.folder / "munge"
        key = place / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o600)
        files = [
            f"--socket={place / 'socket'}",
            f"--key-file={key}",
            f"--log-file={place / 'log'}",
            f"--pid-file={place / 'pid'}",
            f"--seed-file={place / 'seed'}",
        ]
        self._daemon("munged", "--force", *files)

    def _daemon(self, name: str, *options: str) -> None:
        path = program(name)
        if path is None:
            raise RuntimeError(missing())
        done = subprocess.run(
            [path, *options], env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr or done.stdout}")

    def _pids(self, name: str) -> list[int]:
        try:
            return [int((self.folder / name).read_text())]
        except (OSError, ValueError):
            return []


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _end(pid: int) -> None:
    """Asks a daemon to end, and makes it after 5 s."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            time.sleep(0.1)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """`start FOLDER` or `stop FOLDER`."""
    if len(arguments) != 2 or arguments[0] not in ("start", "stop"):
        sys.exit("usage: python tests/slurm_cluster.py start|stop FOLDER")
    cluster = Cluster(Path(arguments[1]))
    if arguments[0] == "stop":
        cluster.stop()
        return
    reason = missing()
    if reason:
        sys.exit(reason)
    cluster.start()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")


if __name__ == "__main__":
    main(sys.argv[1:])
