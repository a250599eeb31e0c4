# ruff: noqa: F811
"""slurm/ on a cluster of another configuration, and submitted in other ways than the plain one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from slurm_cluster import EPOCHS, OPTIONS, reference, same_weights, site  # noqa: F401

sys.path.insert(0, str(helpers.ROOT / "slurm"))
import cpus

LIMIT = 300  # seconds for one job
SCRIPTS = ("train.sh", "seeds.sh", "sweep.sh")

slow = pytest.mark.slow

pytestmark = pytest.mark.timeout(900)


def test_every_process_gets_as_many_cpus():
    assert cpus.divide([0, 1, 2, 3], [set()] * 2) == [[0, 1], [2, 3]]
    assert cpus.divide(list(range(7)), [set()] * 3) == [[0, 1], [2, 3], [4, 5]]
    assert cpus.divide([5], [set()] * 2) == [[5], [5]]


def test_a_process_gets_the_cpus_next_to_its_gpu():
    first, second = {0, 1, 2, 3}, {4, 5, 6, 7}
    assert cpus.divide(list(range(8)), [second, first]) == [[4, 5, 6, 7], [0, 1, 2, 3]]
    # three GPUs share a memory node: the last of them takes what is left elsewhere
    assert cpus.divide(list(range(8)), [first] * 3 + [second]) == [[0, 1], [2, 3], [6, 7], [4, 5]]
    # the job has none of the near ones
    assert cpus.divide([8, 9], [first, second]) == [[8], [9]]


def test_gpus_are_told_from_their_place_on_the_bus(tmp_path, monkeypatch):
    """By index or UUID, in the order in which the job has them; what nvidia-smi says is made up."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 00000000:0A:00.0, 0, GPU-a\necho 00000000:0B:00.0, 1, GPU-b\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cpus, "local_cpus", {"0000:0a:00.0": {0}, "0000:0b:00.0": {1}}.get)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert cpus.near_gpus(2) == [{1}, {0}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    assert cpus.near_gpus(1) == [{1}]
    assert cpus.near_gpus(2) == [set(), set()]  # two processes on one GPU: nobody knows


def test_cpus_as_ranges():
    assert cpus.as_ranges([9, 0, 1, 2, 4]) == "0-2,4,9"


def test_one_line_where_the_repository_is_not_found(tmp_path):
    """In place of bash's 127; the scripts are copied, as Slurm does."""
    for script in SCRIPTS:
        copy = tmp_path / "slurm_script"
        copy.write_bytes((helpers.ROOT / "slurm" / script).read_bytes())
        array = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"}
        done = helpers.launch("bash", copy, "x", cwd=tmp_path, timeout=60, environment=array)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"slurm/{script}: error: the repository is neither in {tmp_path}" in done.stderr
        assert "--chdir" in done.stderr


@pytest.fixture
def submit(site, small_betons):
    """Submits a short run with sbatch's options; returns the job's id."""

    def call(run, *options, epochs=1, **environment):
        where = ("--data_dir", small_betons, "--run_dir", run, "--epochs", str(epochs))
        command = (*options, "slurm/train.sh", *OPTIONS, *where)
        return site.submit(*command, environment=environment)

    return call


def log(site, job, name="mnist_fast"):
    return (site.top / f"{name}-{job}.log").read_text()


def state(job):
    return job["JobState"], job["ExitCode"], job["Restarts"]


def training_processes(run):
    """The processes that train in a folder: the launcher's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"train.py" in words and os.fsencode(run) in words and b"accelerate" not in words[2]:
            found.append(int(folder.name))
    return found


def wait_for_epochs(site, job, run, count=1):
    metrics = run / "metrics.jsonl"
    site.wait(job, LIMIT, lambda _: metrics.exists() and metrics.read_text().count("\n") >= count)


@slow
def test_limited_exports(site, submit, tmp_path):
    """Each leaves the step without PATH unless the script sees to it."""
    ways = {"value": "--export=NAME=value", "none": "--export=NONE", "site": "--verbose"}
    jobs, agents = [], []
    for name, option in ways.items():
        by_default = {"SBATCH_EXPORT": "NONE"} if name == "site" else {}
        jobs.append(submit(tmp_path / name, option, **by_default))
        sweep = ("--array=1", option, "slurm/sweep.sh", "no/such/sweep")
        agents.append(site.submit(*sweep, environment=by_default))
    for job in jobs:
        assert state(site.wait(job, LIMIT)) == ("COMPLETED", "0:0", "0"), log(site, job)
    for agent in agents:  # W&B's own agent starts; it has no key, or no network
        site.wait(f"{agent}_1", LIMIT)
        said = log(site, f"{agent}-1", "mnist_sweep")
        assert "execve" not in said
        assert "wandb" in said


@slow
def test_processes_share_all_cpus_that_the_job_has(site, submit, tmp_path):
    """Though this cluster binds each task to one core, and nothing is said per task."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    run = tmp_path / "run"
    job = submit(run, "--nodes=1", "--exclusive", epochs=500, PROCESSES_PER_NODE="2")
    wait_for_epochs(site, job, run)
    bound = [os.sched_getaffinity(process) for process in training_processes(run)]
    assert sorted(bound, key=sorted) == [{0}, {1}]
    assert "2 processes with 1 threads each, on CPUs 0 1" in log(site, job)
    site.call("scancel", job)  # plainly: it is not queued again
    assert site.wait(job, LIMIT)["JobState"] == "CANCELLED"
    assert "queue it again" not in log(site, job)


@slow
def test_gpus_that_an_exclusive_job_brings(site, tmp_path):
    """The step gets all of them, asked for or not."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "GPUs $CUDA_VISIBLE_DEVICES"\n')
    python.chmod(0o755)
    for asked in ((), ("--gpus-per-node=1",)):
        job = site.submit(
            *("--array=1", "--exclusive", *asked, "slurm/sweep.sh", "a/b/c"),
            environment={"PYTHON": str(python)},
        )
        site.wait(f"{job}_1", LIMIT)
        assert "GPUs 0,1\n" in log(site, f"{job}-1", "mnist_sweep")


@slow
def test_unequal_gpus_are_refused_before_anything_starts(site, submit, tmp_path):
    job = submit(tmp_path / "run", "--nodes=2", "--gpus=3")
    assert state(site.wait(job, LIMIT)) == ("FAILED", "2:0", "0")
    assert "different numbers of GPUs" in log(site, job)


@slow
def test_the_exit_status_of_the_node_that_refuses_is_the_jobs(site, submit, tmp_path):
    """Not that of srun, which kills the others."""
    options = ("--nodes=2", "--gpus-per-node=2")
    job = submit(tmp_path / "run", *options, PROCESSES_PER_NODE="3")
    assert state(site.wait(job, LIMIT)) == ("FAILED", "2:0", "0"), log(site, job)
    assert "2 GPUs for 3 processes" in log(site, job)
    assert not list((tmp_path / "run").iterdir())


@slow
def test_a_preempted_job_is_queued_again(site, submit, reference, tmp_path):
    """Slurm sends SIGTERM to all processes of the step, and not to the script."""
    run = tmp_path / "run"
    job = submit(run, "--nodes=2", "--exclusive", epochs=EPOCHS, PROCESSES_PER_NODE="1")
    wait_for_epochs(site, job, run, 2)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3")
    site.submit(*urgent, "--output=/dev/null")
    site.wait(job, LIMIT, lambda job: job["Restarts"] == "1")
    assert len(helpers.read_records(run)) < EPOCHS, "it was over before it was stopped"
    assert state(site.wait(job, LIMIT)) == ("COMPLETED", "0:0", "1"), log(site, job)
    assert [record["epoch"] for record in helpers.read_records(run)] == list(range(1, EPOCHS + 1))
    assert same_weights(run, reference)
    assert not list(run.glob(".[sfd]*-*")), "files of the scripts are left"


@slow
def test_a_single_process_is_queued_again_too(site, submit, tmp_path):
    """Its launcher dies of SIGTERM at once; cancelled plainly, the job does not come back."""
    run = tmp_path / "run"
    job = submit(run, epochs=500)
    wait_for_epochs(site, job, run)
    site.call("scancel", "--signal=TERM", job)
    site.wait(job, LIMIT, lambda job: job["Restarts"] == "1")
    assert list(run.glob("checkpoints/step-*"))
    assert "the run is stopped" in log(site, job)
    site.wait(job, LIMIT, lambda job: job["JobState"] == "RUNNING")
    site.call("scancel", job)
    assert site.wait(job, LIMIT)["JobState"] == "CANCELLED"
    time.sleep(3)  # time enough for the script to queue it again
    assert site.job(job)["JobState"] == "CANCELLED"


# What a notebook or a task of another job has in its environment.
OTHERS = (
    *("SLURM_RESTART_COUNT=3", "SLURM_ARRAY_TASK_ID=7", "SLURM_GPUS_ON_NODE=2"),
    *("SLURM_MEM_BIND=local", "SLURM_MEM_PER_NODE=100", "SLURM_HINT=nomultithread"),
    *("RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1", "PMI_SIZE=4"),
)


@slow
def test_submitted_from_within_another_job(site, small_betons, tmp_path):
    """From a step that is bound and has its share of memory, and from salloc."""
    step = ("srun", "--ntasks=1", "--mem-per-cpu=300", "--cpu-bind=map_cpu:0", "--mpi=pmi2")
    jobs = []
    for name, outer in {"step": step, "salloc": ("salloc", "--ntasks=1")}.items():
        where = ("--data_dir", small_betons, "--run_dir", tmp_path / name, "--epochs", "1")
        sbatch = ("sbatch", "--parsable", "--mem=900", "slurm/train.sh", *OPTIONS, *where)
        jobs.append(site.call(*outer, "env", *OTHERS, *sbatch).split()[-1])
    for job in jobs:
        assert state(site.wait(job, LIMIT)) == ("COMPLETED", "0:0", "0"), log(site, job)
        assert f"job {job}.0 on" in log(site, job)
        assert "1 nodes with 1 processes each" in log(site, job)


@slow
def test_run_within_a_step(site, small_betons, tmp_path):
    """Without sbatch; it shares the CPUs and memory of the job with the step."""
    run = tmp_path / "run"
    where = ("--data_dir", small_betons, "--run_dir", run, "--epochs", "1")
    site.call("srun", "--ntasks=1", "bash", "slurm/train.sh", *OPTIONS, *where, timeout=LIMIT)
    assert helpers.read_summary(run)["epochs"] == 1


@slow
def test_submitted_from_elsewhere(site, tmp_path):
    """The repository is found by --chdir, or where the script was taken from."""
    expected = {
        "train.sh": "train.py: error: epochs is 0",  # train.py's own check: it was found
        "seeds.sh": "train.py: error: epochs is 0",
        "sweep.sh": "slurm/sweep.sh: error: name one sweep",
    }
    jobs = {}
    for script in expected:
        for options in ([f"--chdir={site.top}"], []):
            output = tmp_path / f"{script}-{len(options)}"
            command = (site.top / "slurm" / script, "--epochs", "0")
            where = ("--array=1", f"--output={output}", *options)
            jobs[output] = site.submit(*where, *command, cwd="/")
    for output, job in jobs.items():
        assert site.wait(f"{job}_1", LIMIT)["ExitCode"] == "2:0"
        assert expected[output.name[:-2]] in output.read_text()


@slow
def test_a_time_limit_shorter_than_the_warning(site, submit, tmp_path):
    """It is refused in one line with both remedies, and each of them helps."""
    for limit, warning in ((1, None), (5, "B:USR1@600")):
        variables = {"SBATCH_SIGNAL": warning} if warning else {}
        job = submit(tmp_path / "bad", f"--time={limit}", **variables)
        assert state(site.wait(job, LIMIT)) == ("FAILED", "2:0", "0")
        (said,) = log(site, job).splitlines()
        assert f"the time limit of {60 * limit} s is shorter than the warning of" in said
        assert "a longer --time" in said
        assert "SBATCH_SIGNAL=B:USR1@30" in said
    assert not (tmp_path / "bad").exists()
    later = submit(tmp_path / "later", "--time=1", epochs=0, SBATCH_SIGNAL="B:USR1@30")
    longer = submit(tmp_path / "longer", "--time=2", "--signal=B:USR1@5", epochs=0)
    for job in (later, longer):  # what train.py refuses has come further
        site.wait(job, LIMIT)
        assert "train.py: error: epochs is 0" in log(site, job)


@slow
def test_two_starts_without_a_step_are_enough(site, submit, tmp_path):
    """A warning that comes before the first step, twice in a row, will come so again."""
    job = submit(tmp_path / "run", "--time=10", epochs=500)
    output = site.top / f"mnist_fast-{job}.log"
    for start in range(2):
        line = f"job {job}.{start} on"
        site.wait(job, LIMIT, lambda _: output.exists() and line in output.read_text())  # noqa: B023
        site.call("scancel", "--batch", "--signal=USR1", job)
        if not start:
            site.wait(job, LIMIT, lambda job: job["Restarts"] == "1")
    assert state(site.wait(job, LIMIT)) == ("FAILED", "2:0", "1"), log(site, job)
    assert "warned in two starts before the first step" in log(site, job)


@slow
@pytest.mark.parametrize("end", ["a lost process", "SIGKILL"])
def test_the_nodes_copy_of_the_data_goes_away(site, submit, tmp_path, end):
    """However the job ends: the copies have no names, and the kernel frees them."""
    scratch, run = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    job = submit(run, "--nodes=2", epochs=500, TMPDIR=str(scratch))
    wait_for_epochs(site, job, run)
    assert log(site, job).count(f"data copied to {scratch}/mnist_fast-{job}-") == 2
    processes = training_processes(run)
    assert len(processes) == 2
    if end == "SIGKILL":  # for the scripts and all that they started
        victims = site.processes(f"SLURM_JOB_ID={job}")
        assert len(victims) > len(processes)
    else:
        victims = processes[1:]
    for process in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    ended = site.wait(job, LIMIT)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log(site, job)
    assert not list(scratch.glob("mnist_fast*"))
    command = f"ls -l /proc/[0-9]*/fd 2>/dev/null | grep {scratch}/mnist_fast"
    still_open = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert not still_open.stdout
