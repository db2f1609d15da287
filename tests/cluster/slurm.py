"""A real SLURM on this machine, for tests: munge, MariaDB, slurmdbd, slurmctld and two slurmd, in some seconds.

Each node is a set of namespaces of its own (host name, mounts and, where asked, network), so a power cut is the SIGKILL
of every process in it. Everything lies under one folder and listens on loopback; nothing outside it is written.
Clocks are short: a lost node is noticed after some 15 s, a requeued job starts again after some 7 s.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacct", "unshare", "nsenter", "ip")
CORES, MEMORY_MEGABYTES, ACCELERATORS = 16, 64000, 4  # of each node, pretended
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}({controller})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld
SlurmdLogFile={root}/log/slurmd.%n
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
RebootProgram=/bin/true
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
MinJobAge=60
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
JobAcctGatherType=jobacct_gather/linux
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={root}/run/munge
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
{nodes}
PartitionName=batch Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes={names} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""

ACCOUNTING = """\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
LogFile={root}/log/slurmdbd
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[2]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounts
"""


def missing() -> str | None:
    """Why no cluster can be brought up here; None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"a real SLURM needs {', '.join(absent)} on PATH (.ci/run names the Debian packages)"
    return "a real SLURM in namespaces needs root" if os.geteuid() else None


def wait_until(condition: Callable[[], object], seconds: float, what: str = "it") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.1)


class Slurm:
    """One cluster of nodes `node1`, `node2`. `isolated` gives each node a network of its own, which can be cut."""

    nodes = ("node1", "node2")

    def __init__(self, root: Path, *, isolated: bool = False):
        self.root, self.isolated = root, isolated
        self.ports = _free_ports(3 + len(self.nodes))
        self.networks = [f"slurm-{os.getpid()}-{number}" for number in range(len(self.nodes) + 1)] if isolated else []
        self.daemons: dict[str, subprocess.Popen] = {}
        self.namespaces: dict[str, set[str]] = {name: set() for name in self.nodes}

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs; with cut networks, also commands that run inside the controller's."""
        environment = {"SLURM_CONF": str(self.root / "slurm.conf")}
        if self.isolated:
            environment["PATH"] = f"{self.root / 'commands'}:{os.environ['PATH']}"
        return environment

    def start(self) -> "Slurm":
        for folder in ("run", "state", "log", "device", "commands", *(f"spool.{name}" for name in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        self.root.chmod(0o755)  # MariaDB's user and munge's clients must reach their own
        self._write_config()
        self._make_networks()
        self._start_munge()
        self._start_accounts()
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self.wait_for_nodes()
        return self

    def stop(self) -> None:
        for name in self.nodes:
            self.power_cut(name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name, signal.SIGTERM)
        for network in self.networks:
            subprocess.run(["ip", "netns", "del", network], check=False, capture_output=True)

    def start_controller(self) -> None:
        self._begin("slurmctld", ["slurmctld", "-D"], network=0)
        wait_until(lambda: self._answers("scontrol", "ping"), 30, "an answer of slurmctld")

    def stop_controller(self) -> None:
        """It saves what it knows; jobs go on. (Killed, it would forget the last seconds.)"""
        self._end("slurmctld", signal.SIGTERM)

    def start_node(self, name: str) -> None:
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2"'
        command = ["unshare", "-u", "-m", "bash", "-c", script, "node", str(self.root / "hosts"), name]
        self._begin(name, command, network=self.nodes.index(name) + 1)
        here, pid = os.readlink("/proc/self/ns/uts"), self.daemons[name].pid
        wait_until(lambda: os.readlink(f"/proc/{pid}/ns/uts") != here, 10, f"the namespace of {name}")
        self.namespaces[name].add(os.readlink(f"/proc/{pid}/ns/uts"))

    def power_cut(self, name: str) -> None:
        """Every process of the node dies at once, without a word to the controller."""
        while processes := _processes_in(self.namespaces[name]):
            for pid in processes:
                _kill(pid)
        if daemon := self.daemons.pop(name, None):
            daemon.wait()

    def cut(self, name: str) -> None:
        """The node and everybody else cannot reach each other; its processes live on."""
        self._link(name, "down")

    def heal(self, name: str) -> None:
        self._link(name, "up")

    def wait_for_nodes(self, seconds: float = 90.0) -> None:
        """Until every node is up and has nothing to do."""
        wait_until(lambda: self.command("sinfo", "-h", "-N", "-p", "batch", "-o", "%t").split()
                   == ["idle"] * len(self.nodes), seconds, "all nodes idle")  # fmt: skip

    def command(self, *command: str, environment: Mapping[str, str] = {}) -> str:
        """Standard output of one of SLURM's commands; empty where it fails."""
        variables = os.environ | self.environment | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    def end_time(self, job: str, seconds: float) -> None:
        """Move the time limit of a running job: its warning comes now, its end some 30 s after `seconds`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        subprocess.run(["scontrol", "update", f"job={job}", f"EndTime={moment}"], env=os.environ | self.environment,
                       check=True)  # fmt: skip

    def cancel_everything(self) -> None:
        self.command("scancel", "--user=root")
        wait_until(lambda: self._answers("squeue", "-h") and not self.command("squeue", "-h"), 60, "an empty queue")

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True).returncode == 0

    def _begin(self, name: str, command: Sequence[str], network: int | None = None, user: str | None = None) -> None:
        # who changes his user himself is no longer told of the death of a parent
        as_user = [f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        command = ["setpriv", *as_user, "--pdeathsig", "KILL", *command]  # not even a killed test run leaves it behind
        if self.isolated and network is not None:
            command = ["nsenter", f"--net=/run/netns/{self.networks[network]}", *command]
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")}, cwd=self.root,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _end(self, name: str, number: int) -> None:
        daemon = self.daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _address(self, node: int) -> str:
        """Of a node by its number from 1; 0 is the controller."""
        if self.isolated:
            return f"10.77.0.{1 + node}"
        return f"127.0.1.1{node}" if node else "127.0.0.1"

    def _write_config(self) -> None:
        for device in range(ACCELERATORS):  # a GPU that is /dev/null
            os.mknod(self.root / "device" / f"nvidia{device}", 0o20666, os.makedev(1, 3))
        nodes = [
            f"NodeName={name} NodeAddr={self._address(number)} Port={self.ports[2 + number]} CPUs={CORES} "
            f"RealMemory={MEMORY_MEGABYTES} Gres=gpu:h100:{ACCELERATORS} State=UNKNOWN"
            for number, name in enumerate(self.nodes, start=1)
        ]
        said = {"root": self.root, "host": socket.gethostname(), "controller": self._address(0), "ports": self.ports}
        text = CONFIG.format(**said, nodes="\n".join(nodes), names=",".join(self.nodes))
        (self.root / "slurm.conf").write_text(text)
        devices = f"AutoDetect=off Name=gpu Type=h100 File={self.root}/device/nvidia[0-{ACCELERATORS - 1}]"
        (self.root / "gres.conf").write_text("".join(f"NodeName={name} {devices}\n" for name in self.nodes))
        (self.root / "slurmdbd.conf").write_text(ACCOUNTING.format(**said))
        (self.root / "slurmdbd.conf").chmod(0o600)
        hosts = [f"{self._address(number)} {name}" for number, name in enumerate(self.nodes, start=1)]
        hosts += ["127.0.0.1 localhost", f"{self._address(0)} {socket.gethostname()}"]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")

    def _make_networks(self) -> None:
        if not self.isolated:
            return
        controller = self.networks[0]
        for network in self.networks:
            _ip("netns", "add", network)
            _ip("-n", network, "link", "set", "lo", "up")
        _ip("-n", controller, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", controller, "addr", "add", f"{self._address(0)}/24", "dev", "bridge0")
        _ip("-n", controller, "link", "set", "bridge0", "up")
        for number, network in enumerate(self.networks[1:], start=1):
            _ip("-n", controller, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", network)
            _ip("-n", controller, "link", "set", f"port{number}", "master", "bridge0", "up")
            _ip("-n", network, "addr", "add", f"{self._address(number)}/24", "dev", "eth0")
            _ip("-n", network, "link", "set", "eth0", "up")
        for name in COMMANDS:
            wrapper = self.root / "commands" / name
            wrapper.write_text(f'#!/bin/bash\nexec nsenter --net=/run/netns/{controller} {shutil.which(name)} "$@"\n')
            wrapper.chmod(0o755)

    def _link(self, name: str, state: str) -> None:
        assert self.isolated, "only a cluster with networks of its own can be cut"
        _ip("-n", self.networks[0], "link", "set", f"port{self.nodes.index(name) + 1}", state)

    def _start_munge(self) -> None:
        key, run = self.root / "munge.key", self.root / "run"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        options = {"key-file": key, "socket": run / "munge", "pid-file": run / "munged.pid",
                   "seed-file": run / "munged.seed", "log-file": self.root / "log" / "munged"}  # fmt: skip
        self._begin("munged", ["munged", "--foreground", *(f"--{name}={path}" for name, path in options.items())])
        wait_until((run / "munge").exists, 20, "munge's socket")

    def _start_accounts(self) -> None:
        database, run = self.root / "database", self.root / "run" / "mariadb"
        for folder in (database, run):
            folder.mkdir()
            shutil.chown(folder, "mysql", "mysql")
        own = ["--no-defaults", "--user=mysql", f"--datadir={database}"]  # in this order
        install = ["mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db"]
        for _ in range(3):  # on a busy machine it failed once in forty, and said nothing of use
            done = subprocess.run([*install, "--skip-name-resolve"], capture_output=True, text=True)
            if done.returncode == 0:
                break
        assert done.returncode == 0, f"mariadb-install-db: {done.stdout} {done.stderr}"
        self._begin(
            "mariadbd",
            ["mariadbd", *own, f"--socket={run}/socket", f"--pid-file={run}/pid", f"--port={self.ports[2]}",
             "--bind-address=127.0.0.1", "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0",
             "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"],
            network=0, user="mysql",
        )  # fmt: skip
        client = ["mariadb", "--no-defaults", f"--socket={run}/socket", "--user=root"]
        wait_until(lambda: self._answers(*client, "--execute=SELECT 1"), 60, "an answer of MariaDB")
        grant = "GRANT ALL ON accounts.* TO slurm@'127.0.0.1'"
        make = f"CREATE DATABASE accounts; CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; {grant};"
        subprocess.run([*client, f"--execute={make}"], check=True)
        self._begin("slurmdbd", ["slurmdbd", "-D"], network=0)
        inside = ["nsenter", f"--net=/run/netns/{self.networks[0]}"] if self.isolated else []
        wait_until(lambda: self._answers(*inside, "sacctmgr", "-n", "show", "cluster"), 60, "an answer of slurmdbd")
        self._answers(*inside, "sacctmgr", "-i", "add", "cluster", "test")


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _processes_in(namespaces: set[str]) -> list[int]:
    """Processes whose host name is of one of these namespaces, but for the dead that nobody has buried."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            inside = os.readlink(f"/proc/{entry.name}/ns/uts") in namespaces
            if inside and Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":  # a cluster to try things on: python -m tests.cluster.slurm FOLDER; Ctrl-C ends it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    cluster = Slurm(Path(sys.argv[1]).absolute())
    try:
        cluster.start()
        sys.stdout.write(f"export SLURM_CONF={cluster.root}/slurm.conf\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        cluster.stop()
