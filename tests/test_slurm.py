# ruff: noqa: F811
"""slurm/ on a real SLURM, started for these tests on this machine."""

import json
import shutil
import subprocess

import helpers
import pytest
from slurm_cluster import EPOCHS, OPTIONS, cluster, reference, same_weights  # noqa: F401

SCRIPTS = ("train.sh", "seeds.sh", "sweep.sh")
LIMIT = 600  # seconds for one job

slow = pytest.mark.slow


def status(folder):
    return json.loads((folder / "status.json").read_text())["status"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    scripts = sorted((helpers.ROOT / "slurm").glob("*.sh"))
    subprocess.run(["shellcheck", "-x", *scripts], check=True, timeout=60, cwd=helpers.ROOT)


@pytest.mark.parametrize("script", ["train.sh", "sweep.sh"])
def test_the_sites_file_may_use_variables_that_are_not_set(script, tmp_path):
    """As the functions of environment modules and conda do."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "train.py").touch()
    (tmp_path / "slurm/node.sh").touch()
    shutil.copy(helpers.ROOT / "slurm/job.sh", tmp_path / "slurm")
    (tmp_path / "slurm/site.sh").write_text('echo "$NOT_SET"; PYTHON=/nowhere/python\n')
    environment = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ("bash", helpers.ROOT / "slurm" / script, "--epochs=1")
    done = helpers.launch(*command, cwd=tmp_path, timeout=60, environment=environment)
    assert done.returncode == 2
    assert "/nowhere/python is not there" in done.stderr


def test_an_array_chooses_the_seed(tmp_path):
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ("bash", helpers.ROOT / "slurm/seeds.sh", "--epochs", "1", "--seed=3")
    done = helpers.launch(*command, cwd=tmp_path, timeout=60, environment=environment)
    assert done.returncode == 2
    assert "--seed is chosen per task of the array" in done.stderr


@slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_sbatch_accepts_it(cluster, script):
    said = cluster.call("sbatch", "--test-only", "--nodes=1", f"slurm/{script}", check=False)
    assert "to start at" in said


@slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("nodes, processes, signal", [(1, 2, "USR1"), (2, 1, "TERM")])
def test_a_stopped_job_is_queued_again_and_ends_with_the_same_weights(
    cluster,
    reference,
    small_betons,
    tmp_path,
    nodes,
    processes,
    signal,
):
    """Slurm sends SIGUSR1 before the time limit, an administrator perhaps SIGTERM."""
    run = tmp_path / "run"
    job = cluster.submit(
        *(f"--nodes={nodes}", f"--cpus-per-task={processes}", "slurm/train.sh", *OPTIONS),
        *(
            "--data_dir",
            small_betons,
            "--run_dir",
            run,
            "--epochs",
            str(EPOCHS),
            "--wandb",
            "offline",
        ),
        environment={"PROCESSES_PER_NODE": str(processes)},
    )
    metrics = run / "metrics.jsonl"
    cluster.wait(
        job, LIMIT, lambda _: metrics.exists() and len(metrics.read_text().splitlines()) > 1
    )
    cluster.call("scancel", "--batch", f"--signal={signal}", job)
    cluster.wait(job, LIMIT, lambda job: job["Restarts"] == "1")
    assert len(helpers.read_records(run)) < EPOCHS, "it was over before it was stopped"
    assert status(run) == "stopped"
    ended = cluster.wait(job, LIMIT)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), cluster.logs()
    assert [record["epoch"] for record in helpers.read_records(run)] == list(range(1, EPOCHS + 1))
    assert helpers.read_summary(run)["world_size"] == 2
    assert same_weights(run, reference)
    log = cluster.top / f"mnist_fast-{job}.log"
    assert log.read_text().count("copied to") == 2 * nodes
    assert "resumed at epoch" in log.read_text()
    ids = [path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")]
    assert len(ids) >= 2
    assert len(set(ids)) == 1, "each start has to go on with the same W&B run"


# Copies like cp, and flips the first bit of the copied train.beton as often as FAULTS says.
FAULTY_CP = """#!/bin/bash
/bin/cp "$@"
count=$(cat "$COUNTER")
if ((count < FAULTS)); then
  echo $((count + 1)) >"$COUNTER"
  printf 'X' | dd of="${@: -1}/train.beton" bs=1 conv=notrunc status=none
fi
"""


@slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_damaged_copy_of_the_data_is_noticed(cluster, small_betons, tmp_path, copies):
    """Once: copied again. Each time: the shared files are read."""
    (tmp_path / "cp").write_text(FAULTY_CP)
    (tmp_path / "cp").chmod(0o755)
    (tmp_path / "counter").write_text("0")
    path = f"{tmp_path}:{cluster.environment['PATH']}"
    job = cluster.submit(
        *("slurm/train.sh", *OPTIONS, "--data_dir", small_betons),
        *("--run_dir", tmp_path / "run", "--epochs", "1"),
        environment={"PATH": path, "COUNTER": str(tmp_path / "counter"), "FAULTS": str(copies)},
    )
    ended = cluster.wait(job, LIMIT)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), cluster.logs()
    log = (cluster.top / f"mnist_fast-{job}.log").read_text()
    assert log.count("train.beton is not what was written") == copies
    assert ("data copied to" in log) == (copies == 1)
    assert ("it could not be copied" in log) == (copies == 2)
    assert status(tmp_path / "run") == "finished"


@slow
@pytest.mark.timeout(1500)
def test_damaged_shared_data_ends_the_job(cluster, small_betons, tmp_path):
    shutil.copytree(small_betons, tmp_path / "betons")
    content = bytearray((tmp_path / "betons" / "test.beton").read_bytes())
    content[-1] ^= 4
    (tmp_path / "betons" / "test.beton").write_bytes(content)
    where = ("--data_dir", tmp_path / "betons", "--run_dir", tmp_path / "run")
    ended = cluster.wait(job := cluster.submit("slurm/train.sh", *OPTIONS, *where), LIMIT)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), cluster.logs()
    assert "test.beton is not what was written" in cluster.logs(), job
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@slow
@pytest.mark.timeout(1500)
def test_the_time_limit_queues_it_again_even_before_the_first_step(
    cluster,
    small_betons,
    tmp_path,
):
    run = tmp_path / "run"
    job = cluster.submit(
        *("--time=2", "--signal=B:USR1@119", "slurm/train.sh", *OPTIONS),
        *("--data_dir", small_betons, "--run_dir", run, "--epochs", "100"),
    )
    cluster.wait(job, LIMIT, lambda job: job["Restarts"] == "1")
    cluster.call("scancel", job)
    assert cluster.wait(job, LIMIT)["JobState"] == "CANCELLED"


@slow
@pytest.mark.timeout(1500)
def test_requeues_are_capped(cluster, small_betons, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit(
        *("slurm/train.sh", *OPTIONS),
        *("--data_dir", small_betons, "--run_dir", run, "--epochs", "500"),
        environment={"MAX_REQUEUES": "0"},
    )
    cluster.wait(job, LIMIT, lambda _: (run / "metrics.jsonl").exists())
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    ended = cluster.wait(job, LIMIT)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), cluster.logs()
    assert status(run) == "stopped"


@slow
@pytest.mark.timeout(1500)
def test_a_failing_job_is_reported_and_not_queued_again(cluster, small_betons, tmp_path):
    where = ("--data_dir", small_betons, "--run_dir", tmp_path / "run")
    bad = {
        "2:0": ("--epochs", "0"),
        "1:0": ("--epochs", "20", "--learning_rate", "1000"),
    }
    jobs = {
        code: cluster.submit("slurm/train.sh", *OPTIONS, *where, *options)
        for code, options in bad.items()
    }
    for code, job in jobs.items():
        ended = cluster.wait(job, LIMIT)
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", code), cluster.logs()
        assert ended["Restarts"] == "0"
    assert status(tmp_path / "run") == "failed"


@slow
@pytest.mark.timeout(1500)
def test_an_array_of_seeds(cluster, small_betons):
    array = cluster.submit(
        *("--array=1-2", "slurm/seeds.sh", *helpers.QUICK),
        *("--data_dir", small_betons, "--epochs", "1"),
    )
    for seed in (1, 2):
        ended = cluster.wait(f"{array}_{seed}", LIMIT)
        assert ended["JobState"] == "COMPLETED", cluster.logs()
        run = cluster.top / "runs" / f"mnist_seeds-{array}" / f"seed-{seed}"
        assert helpers.read_summary(run)["seed"] == seed


@slow
@pytest.mark.timeout(1500)
def test_two_jobs_with_one_run_folder(cluster, reference, small_betons, tmp_path):
    run = tmp_path / "run"
    command = ("--cpus-per-task=2", "slurm/train.sh", *OPTIONS)
    where = ("--data_dir", small_betons, "--run_dir", run, "--epochs", str(EPOCHS))
    two = {"PROCESSES_PER_NODE": "2"}
    jobs = [cluster.submit(*command, *where, environment=two) for _ in range(2)]
    ended = [cluster.wait(job, LIMIT)["JobState"] for job in jobs]
    assert sorted(ended) == ["COMPLETED", "FAILED"], cluster.logs()
    assert f"another process trains in {run}" in cluster.logs()
    assert status(run) == "finished"
    assert same_weights(run, reference)


@slow
def test_an_unknown_head_node_stops_the_job(cluster, small_betons, tmp_path):
    fake = tmp_path / "getent"
    fake.write_text("#!/bin/sh\nexit 2\n")
    fake.chmod(0o755)
    job = cluster.submit(
        *("slurm/train.sh", *OPTIONS, "--data_dir", small_betons, "--run_dir", tmp_path / "run"),
        environment={"PATH": f"{tmp_path}:{cluster.environment['PATH']}"},
    )
    ended = cluster.wait(job, LIMIT)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "cannot be resolved" in cluster.logs()


@slow
def test_a_sweep_starts_its_agent(cluster, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "started: $*"\n')
    python.chmod(0o755)
    job = cluster.submit(
        *("--array=1", "slurm/sweep.sh", "entity/project/abc"),
        environment={"PYTHON": str(python), "RUNS_PER_AGENT": "3"},
    )
    assert cluster.wait(f"{job}_1", LIMIT)["ExitCode"] == "0:0", cluster.logs()
    wanted = "started: -m wandb agent --forward-signals --count 3 entity/project/abc"
    assert wanted in cluster.logs()


@slow
def test_a_sweep_needs_its_name(cluster):
    job = cluster.submit("--array=1", "slurm/sweep.sh")
    assert cluster.wait(f"{job}_1", LIMIT)["ExitCode"] == "2:0"
