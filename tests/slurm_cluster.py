"""A real SLURM on this machine: munged, slurmctld and two slurmd, from Debian's slurm-wlm."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import helpers
import pytest

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
LINKED = ("train.py", "accelerate_config.yaml", "mnist_fast", "data_prep", "slurm")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# seconds (120 by default, 5 at least) until a queued job starts again: its credential is void
AuthInfo=socket={folder}/munge.socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=10
# the machine may have fewer CPUs than the nodes
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why no SLURM can be started here; empty where it can."""
    if os.geteuid():
        return "starting SLURM needs root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    return f"not installed: {', '.join(absent)} (apt: slurm-wlm munge)" if absent else ""


class Cluster:
    """The running cluster, and a folder from which jobs are submitted.

    Attributes:
        top: stands for the top of the repository: links to it, and room for logs and runs.
    """

    def __init__(self, folder):
        self.folder, self.top = folder, folder / "top"
        self.daemons = []
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "PYTHON": str(helpers.ROOT / ".venv/bin/python"),
        }

    def start(self):
        for name in ("state", "spool-n1", "spool-n2", "top"):
            (self.folder / name).mkdir()
        for name in LINKED:
            (self.top / name).symlink_to(helpers.ROOT / name)
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
        files |= {"log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        self.daemon("munged", "--foreground", "--force", *options)
        wait_for((self.folder / "munge.socket").exists, 20, "munged")
        self.daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node)
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 60, "n1")

    def daemon(self, program, *arguments):
        with (self.folder / f"{program}.log").open("ab") as log:
            process = subprocess.Popen(
                # ended with this process, however that ends
                ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.daemons.append(process)

    def stop(self):
        """Ends every job and daemon, and what they started."""
        if len(self.daemons) == 4:
            self.call("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 20
            while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for process in reversed(self.daemons):
            process.terminate()
        for process in self.daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self):
        """Processes that belong to this cluster: they have its configuration."""
        mark, found = self.environment["SLURM_CONF"].encode(), []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has just ended
                if mark in environment.read_bytes():
                    found.append(int(environment.parent.name))
        return found

    def call(self, *command, check=True, environment=None):
        """Runs one of SLURM's programs; returns what it wrote."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment | (environment or {}),
            cwd=self.top,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def submit(self, *arguments, environment=None):
        """Submits a job; returns its id."""
        return self.call("sbatch", "--parsable", *arguments, environment=environment).strip()

    def job(self, number):
        """A job's fields, as `scontrol show job` has them."""
        text = self.call("scontrol", "show", "job", "-o", str(number))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number, seconds, until=None):
        """Waits until a job has ended, or for another condition; returns its fields."""
        deadline = time.monotonic() + seconds
        until = until or is_over
        while not until(job := self.job(number)):
            if is_over(job) or time.monotonic() > deadline:
                raise TimeoutError(f"{job}\n{self.logs()}")
            time.sleep(0.5)
        return job

    def logs(self):
        """What all jobs wrote."""
        return "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted(self.top.glob("*.log")))


def is_over(job):
    """Whether a job has ended for good."""
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        running.start()
        yield running
    finally:
        running.stop()
