"""A real SLURM on this machine: munged, slurmctld and two slurmd, from Debian's slurm-wlm."""

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import helpers
import pytest
from safetensors.torch import load_file

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
LINKED = (*("train.py", "accelerate_config.yaml", "mnist_fast", "data_prep", "slurm"), ".venv")

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
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=10
# the machine may have fewer CPUs than the nodes
SlurmdParameters=config_overrides
"""

# What differs from cluster to cluster.
DEFAULTS = {
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "SelectTypeParameters": "CR_CPU",
    "MpiDefault": "none",
}
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {resources}\n"
PARTITIONS = ("all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP",)


def missing():
    """Why no SLURM can be started here; empty where it can."""
    if os.geteuid():
        return "starting SLURM needs root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    return f"not installed: {', '.join(absent)} (apt: slurm-wlm munge)" if absent else ""


class Cluster:
    """The running cluster, and a folder from which jobs are submitted.

    Args:
        folder: holds the configuration, the daemons' state and logs, and `top`.
        resources: what each node has, in the words of slurm.conf.
        partitions: the rest of their lines, each with its name first.
        gres: the lines of gres.conf.
        **settings: entries of slurm.conf; what is not given is in DEFAULTS.

    Attributes:
        top: stands for the top of the repository: links to it, and room for logs and runs.
    """

    def __init__(self, folder, resources="CPUs=4", partitions=PARTITIONS, gres="", **settings):
        self.folder, self.top = folder, folder / "top"
        self.resources, self.partitions, self.gres = resources, partitions, gres
        self.settings = DEFAULTS | settings
        self.daemons = []
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "PYTHON": str(helpers.ROOT / ".venv/bin/python"),
            "TMPDIR": str(folder),  # jobs of another cluster have the same numbers
        }

    def start(self):
        for name in ("state", "spool-n1", "spool-n2", "top"):
            (self.folder / name).mkdir()
        for name in LINKED:
            (self.top / name).symlink_to(helpers.ROOT / name)
        (self.folder / "slurm.conf").write_text(self.configuration())
        (self.folder / "gres.conf").write_text(self.gres)
        (self.folder / "cgroup.conf").write_text("ConstrainCores=yes\n")
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

    def configuration(self):
        """The text of slurm.conf."""
        host, ports = socket.gethostname().split(".")[0], free_ports(3)
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=ports)
        text += "".join(f"{name}={value}\n" for name, value in self.settings.items())
        for name, port in zip(("n1", "n2"), ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, resources=self.resources)
        return text + "".join(f"PartitionName={line}\n" for line in self.partitions)

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

    def processes(self, *variables):
        """Processes of this cluster: they have its configuration, and other variables if given."""
        marks = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        marks |= {variable.encode() for variable in variables}
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has just ended
                if marks <= set(environment.read_bytes().split(b"\0")):
                    found.append(int(environment.parent.name))
        return found

    def call(self, *command, check=True, environment=None, cwd=None, timeout=60):
        """Runs one of SLURM's programs; returns what it wrote."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment | (environment or {}),
            cwd=cwd or self.top,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def submit(self, *arguments, environment=None, cwd=None):
        """Submits a job; returns its id."""
        command = ("sbatch", "--parsable", *arguments)
        return self.call(*command, environment=environment, cwd=cwd).strip()

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
    """Ports that nobody listens on, below those that the system gives to connections."""
    found = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 1_000):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free port")


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.2)


@contextlib.contextmanager
def running(folder, **configuration):
    """A cluster, as long as the context lasts; skips the test where there is no SLURM."""
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(folder, **configuration)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One partition, nothing bound, nothing preempted."""
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Another cluster: cores bound one by one, memory shared out, PMI-2, GPUs and preemption.

    Jobs of the partition `urgent` take the place of the others, a minute after a warning.
    """
    preempted = "Default=YES PriorityTier=1 GraceTime=60 DefMemPerCPU=500"
    urgent = "PriorityTier=10 PreemptMode=OFF DefMemPerCPU=500"
    with running(
        tmp_path_factory.mktemp("site"),
        resources="CPUs=2 CoresPerSocket=2 RealMemory=4000 Gres=gpu:2",
        gres="NodeName=n1,n2 Name=gpu File=/dev/tty[0-1]\n",
        partitions=[
            f"{name} Nodes=n1,n2 MaxTime=INFINITE State=UP {rest}"
            for name, rest in (("low", preempted), ("urgent", urgent))
        ],
        GresTypes="gpu",
        TaskPlugin="task/affinity",
        TaskPluginParam="autobind=cores",
        SelectTypeParameters="CR_Core_Memory",
        MpiDefault="pmi2",
        PreemptType="preempt/partition_prio",
        PreemptMode="REQUEUE",
    ) as cluster:
        yield cluster


# Dropout, EMA and a smaller last batch: all that a resumed run has to get right.
OPTIONS = (*helpers.QUICK, "--recipe", "notebook", "--ema_decay", "0.98", "--threads", "1")


EPOCHS = 24  # so that a request to stop comes before the end on fast machines too


@pytest.fixture(scope="session")
def reference(small_betons, tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.getbasetemp() / "reference" / "run"
    if (folder / "summary.json").exists():  # another file of tests has asked for it
        return folder
    folder.parent.mkdir()
    where = ("--data_dir", small_betons, "--run_dir", folder)
    done = helpers.torchrun(
        2, helpers.TRAIN, *OPTIONS, *where, "--epochs", str(EPOCHS), cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    return folder


def same_weights(one, other):
    """Whether two runs ended with the same weights, bit by bit."""
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
