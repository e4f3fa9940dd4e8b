"""A SLURM cluster of two nodes on this machine: a controller, accounting in MariaDB and two `slurmd`. Needs root."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.waiting import wait_until

ETC = Path("/etc/slurm")  # Snakemake's jobs have no SLURM_CONF, so the configuration must be where SLURM looks for it
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd")
NODES = ("n1", "n2")
DATABASE_USER = "CREATE USER slurm@localhost IDENTIFIED BY 'slurm';\nGRANT ALL ON *.* TO slurm@localhost;\n"

SLURM = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=20
MinJobAge=300
SchedulerParameters=bf_interval=5
JobAcctGatherType=jobacct_gather/linux
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{accounting}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=16 RealMemory=128000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=16 RealMemory=128000 Gres=gpu:1
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={host}
AccountingStoragePort={database}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu"""
GPUS = "NodeName=n1 Name=gpu File=/dev/null\nNodeName=n2 Name=gpu File=/dev/zero\n"
DATABASE = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={database}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


class Cluster:
    """Daemons as child processes; `close` ends them and removes the configuration."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.values: dict[str, object] = {"folder": folder, "host": socket.gethostname()}
        for name in ("controller", "database", "mariadb", *NODES):
            self.values[name] = free_port()
        self.links: list[Path] = []
        (folder / "state").mkdir()
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
        self.configure(accounting=True)

    def configure(self, *, accounting: bool) -> None:
        """Write the configuration and link to it from /etc/slurm, where no other may be."""
        storage = ACCOUNTING.format(**self.values) if accounting else ""
        files = {
            "slurm.conf": SLURM.format(**self.values, accounting=storage),
            "slurmdbd.conf": DATABASE.format(**self.values),
            "gres.conf": GPUS,
        }
        for name, content in files.items():
            path, link = self.folder / name, ETC / name
            path.write_text(content)
            path.chmod(0o600)  # slurmdbd refuses another mode
            if link not in self.links:
                ETC.mkdir(exist_ok=True)
                link.symlink_to(path)
                self.links.append(link)

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        self._start_munge()
        self._start_database()
        self.spawn("slurmdbd", "slurmdbd", "-D")
        wait_until(lambda: answers("sacctmgr", "-n", "list", "cluster"), seconds=60)
        run("sacctmgr", "-i", "add", "cluster", "test")
        run("sacctmgr", "-i", "add", "account", "lab")
        run("sacctmgr", "-i", "add", "user", "root", "account=lab")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        paths["seed-file"] = "munge.seed"
        options = [f"--{option}={self.folder / name}" for option, name in paths.items()]
        self.spawn("munged", "munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, seconds=30)

    def _start_database(self) -> None:
        data = self.folder / "mariadb"
        run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db")
        first = self.folder / "user.sql"
        first.write_text(DATABASE_USER)
        options = [f"--datadir={data}", f"--socket={self.folder}/mariadb.socket", f"--init-file={first}"]
        options += ["--user=root", "--bind-address=127.0.0.1", f"--port={self.values['mariadb']}"]
        self.spawn("mariadbd", "mariadbd", "--no-defaults", *options)
        wait_until(lambda: is_open(self.values["mariadb"]), seconds=60)

    def start_controller(self) -> None:
        """Start `slurmctld`."""
        self.spawn("slurmctld", "slurmctld", "-D")
        wait_until(lambda: answers("scontrol", "ping"), seconds=30)

    def start_node(self, node: str) -> None:
        """Start `slurmd` of a node."""
        self.spawn(node, "slurmd", "-D", "-N", node)

    def wait_until_idle(self) -> None:
        """Wait until both nodes can take jobs."""
        wait_until(lambda: run("sinfo", "-h", "-p", "gpu", "-t", "idle", "-o", "%D").strip() == "2", seconds=60)

    def spawn(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground."""
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=plain_environment()
            )

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a daemon by its process id."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def kill_node(self, node: str, job: str) -> None:
        """Kill `slurmd` and all processes of a job as a power cut does."""
        self.stop(node, signal.SIGKILL)
        for process in processes_of(job):
            os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """Cancel all jobs, end the daemons in the order of their dependence, and remove the configuration."""
        try:
            if "slurmctld" in self.daemons:
                subprocess.run(["scancel", "--signal=KILL", "--user=root"], timeout=30)
                subprocess.run(["scancel", "--user=root"], timeout=30)
                wait_until(lambda: not run("squeue", "-h"), seconds=60)
        finally:
            for name in (*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"):
                if name in self.daemons:
                    self.stop(name)
            for link in self.links:
                link.unlink(missing_ok=True)


def obstacle() -> str | None:
    """Return the reason why no cluster can be started here."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)}: run `make test-slurm`"
    present = [name for name in ("slurm.conf", "slurmdbd.conf", "gres.conf") if (ETC / name).is_symlink()]
    present += [name for name in ("slurm.conf", "slurmdbd.conf", "gres.conf") if (ETC / name).exists()]
    return f"{ETC}/{present[0]} is there: this machine has a SLURM of its own" if present else None


def run(*command: str) -> str:
    """Run a command to a successful end and return its output."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain_environment())
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def answers(*command: str) -> bool:
    """Return whether a command succeeds."""
    return subprocess.run(command, capture_output=True, timeout=60, env=plain_environment()).returncode == 0


def plain_environment() -> dict[str, str]:
    """Return the environment of daemons and commands, without the tests' Python."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def is_open(port: object) -> bool:
    """Return whether a server listens on this port."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", int(str(port)))) == 0


def processes_of(job: str) -> list[int]:
    """Return the processes of a job of SLURM, its `slurmstepd` first."""
    steps, others = [], []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if title.startswith(f"slurmstepd: [{job}.".encode()):
            steps.append(int(folder.name))
        elif f"SLURM_JOB_ID={job}".encode() in variables:
            others.append(int(folder.name))
    return steps + others
