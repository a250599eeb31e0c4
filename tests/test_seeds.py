"""benchmarks/seeds.py: statistics, jobs that end, hang or fail, and what is not trained again."""

import argparse
import json
import os
import signal
import sys
import time

import pytest

from benchmarks import seeds
from mnist_fast import signals
from mnist_fast.errors import InputError, RunError, Stopped

QUICK = ["--dataset", "digits", "--epochs", "1", "--batch_size", "64", "--precision", "no"]
QUICK += ["--validation_split", "1300"]


def python_job(tmp_path, code, name="job", timeout=60.0):
    return seeds.Job([1], [sys.executable, "-c", code], tmp_path / f"{name}.log", timeout)


def soon(seconds=60.0):
    return time.monotonic() + seconds


def choices(**changes):
    usual = {"seed_timeout": 100.0, "time_limit": 100.0, "parallel": 1}
    return argparse.Namespace(**(usual | changes))


def test_statistics_are_students():
    found = seeds.statistics([99.57, 99.46, 99.51])
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(99.51333, abs=1e-5)
    assert found["sd"] == pytest.approx(0.0550757, abs=1e-6)
    # t(0.975, 2) = 4.302653
    assert found["ci95"] == pytest.approx([99.376518, 99.650149], abs=1e-5)
    assert (found["min"], found["max"]) == (99.46, 99.57)


def test_one_value_has_no_spread():
    assert seeds.statistics([3.0]) == {"n": 1, "mean": 3.0, "sd": None, "ci95": None} | {
        "min": 3.0,
        "max": 3.0,
    }


def test_jobs_run_in_their_slots(tmp_path):
    code = "import os, pathlib; pathlib.Path(r'{}').write_text(os.environ['SLOT'])"
    jobs = [python_job(tmp_path, code.format(tmp_path / f"{n}.txt"), str(n)) for n in range(5)]
    slots = [{"SLOT": "a"}, {"SLOT": "b"}]
    assert seeds.run_jobs(jobs, slots, soon()) == []
    written = [(tmp_path / f"{n}.txt").read_text() for n in range(5)]
    assert written[:2] == ["a", "b"]
    assert set(written) == {"a", "b"}
    assert all(float((tmp_path / f"{n}.seconds").read_text()) > 0 for n in range(5))


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
    jobs = [
        python_job(tmp_path, "raise SystemExit('out of order')", "bad"),
        python_job(tmp_path, f"open(r'{tmp_path / 'done'}', 'w')", "good"),
    ]
    failures = seeds.run_jobs(jobs, [{}], soon())
    assert len(failures) == 1
    assert "exit status 1: out of order" in failures[0]
    assert (tmp_path / "done").exists()


def test_refused_input_ends_all_at_once(tmp_path):
    code = "import sys; print('train.py: error: no data in /x', file=sys.stderr); sys.exit(2)"
    jobs = [
        python_job(tmp_path, code, "refused"),
        python_job(tmp_path, "import time; time.sleep(100)", "waits"),
    ]
    with pytest.raises(InputError, match=r"^seeds \[1\]: no data in /x$"):
        seeds.run_jobs(jobs, [{}, {}], soon())
    assert jobs[1].process.poll() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runs", "FILE"), "FILE: File exists: choose another --runs"),
        (("--results", "FILE/x"), "FILE/x: Not a directory: choose another --results"),
        (("--name", "a/b"), "--name a/b: "),
        (("--seeds", "abc"), "--seeds: invalid int value: 'abc'"),
        (("--seeds", "0"), "--seeds is 0: "),
        (("--parallel", "-1"), "--parallel is -1: "),
        (("--time_limit", "nan"), "--time_limit is nan: "),
    ],
)
def test_bad_choices_are_refused_before_anything_is_trained(
    options, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(seeds, "train_seeds", lambda *_: pytest.fail("trained"))
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["seeds.py", *folders, *options])
    with pytest.raises(InputError) as refused:
        seeds.main()
    assert message in str(refused.value)


def test_a_damaged_summary_is_named(tmp_path):
    experiment = seeds.open_experiment(["--recipe", "fast"], tmp_path)
    experiment.run_dir(1).mkdir(parents=True)
    (experiment.run_dir(1) / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"seed-1/summary.json: damaged"):
        experiment.summary(1)


def test_a_hanging_job_is_stopped(tmp_path):
    started = time.monotonic()
    failures = seeds.run_jobs(
        [python_job(tmp_path, "import time; time.sleep(100)", timeout=1)], [{}], soon()
    )
    assert "not finished after 1 s" in failures[0]
    assert time.monotonic() - started < 30


def test_a_job_that_ignores_the_request_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds.records, "GRACE", 0.5)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    )
    job = python_job(tmp_path, code + "; time.sleep(100)", timeout=1e3)
    job.start()
    while not job.log.read_text():
        time.sleep(0.05)
    job.stop()
    assert job.process.returncode == -signal.SIGKILL


def test_the_time_limit_stops_everything(tmp_path):
    job = python_job(tmp_path, "import time; time.sleep(100)")
    with pytest.raises(Stopped, match="the same command goes on"):
        seeds.run_jobs([job], [{}], soon(0.5))
    assert job.process.poll() is not None


def test_a_request_to_stop_is_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "requested", lambda: "SIGTERM")
    job = python_job(tmp_path, "import time; time.sleep(100)")
    with pytest.raises(Stopped):
        seeds.run_jobs([job], [{}], soon())
    assert job.process.poll() is not None


def test_cpu_slots_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert seeds.cpu_slots(None) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert seeds.cpu_slots(2) == [{"OMP_NUM_THREADS": "4"}] * 2


def test_gpu_slots_are_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert seeds.gpu_slots(2) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert seeds.gpu_slots(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_same_choices_same_folder(tmp_path):
    """What is learned decides, not how the options are written or where the data lie."""

    def folder(*options):
        return seeds.open_experiment(["--recipe", "fast", *options], tmp_path).folder

    assert folder("--epochs", "15") == folder("--data_dir", "elsewhere") == folder()
    assert folder("--epochs", "16") != folder()
    assert folder("--validation_split", "5000") != folder()


@pytest.mark.parametrize("option", ["--seed", "--run_dir=x", "--resume"])
def test_options_that_are_chosen_here_are_refused(option, tmp_path):
    with pytest.raises(InputError, match="leave it out"):
        seeds.open_experiment([option, "1"], tmp_path)


def test_finished_seeds_are_not_trained_again(tmp_path, monkeypatch):
    experiment = seeds.open_experiment(["--recipe", "fast"], tmp_path)
    for seed in (1, 3):
        experiment.run_dir(seed).mkdir(parents=True)
        (experiment.run_dir(seed) / "summary.json").write_text("{}")
    started = []
    monkeypatch.setattr(seeds, "count_gpus", lambda: 0)
    monkeypatch.setattr(seeds, "run_jobs", lambda jobs, *_: started.extend(jobs) or [])
    seeds.train_seeds(experiment, [1, 2, 3, 4], False, choices())
    assert [job.seeds for job in started] == [[2], [4]]
    assert "disabled" in started[0].command
    started.clear()
    seeds.train_seeds(experiment, [1, 2, 3, 4], True, choices())
    assert [job.seeds for job in started] == [[2, 4]]


def test_failed_seeds_are_an_error(tmp_path, monkeypatch):
    experiment = seeds.open_experiment(["--recipe", "fast"], tmp_path)
    monkeypatch.setattr(seeds, "run_jobs", lambda *_: ["seeds [1]: exit status 1"])
    with pytest.raises(RunError, match="exit status 1"):
        seeds.train_seeds(experiment, [1], False, choices())


def test_one_program_to_report(small_betons, in_process, tmp_path, monkeypatch, capsys):
    """The whole way, with the program of all seeds in this process instead of in its own."""
    options = [*QUICK, "--data_dir", str(small_betons)]

    def here(jobs, *_):
        for job in jobs:
            split = job.command.index("--")
            seeds.work(tmp_path / job.log.parent, job.seeds, job.command[split + 1 :])
        return []

    monkeypatch.setattr(seeds, "run_jobs", here)
    arguments = ["--recipe", "fast", "--seeds", "2", "--first", "4", "--one_program", "true"]
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--name", "x"]
    monkeypatch.setattr(sys, "argv", ["seeds.py", *arguments, *folders, *options])
    assert seeds.main() == 0
    text = (tmp_path / "seeds-x.json").read_text()
    report = json.loads(text)
    assert [run["seed"] for run in report["runs"]] == [4, 5]
    assert report["accuracy"]["n"] == 2
    assert report["evaluated_on"] == "validation"
    assert str(tmp_path) not in text
    assert str(small_betons) not in text
    assert (tmp_path / "seeds-x.png").stat().st_size > 1000
    assert "n = 2 seeds, last epoch" in capsys.readouterr().out
