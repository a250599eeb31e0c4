"""The benchmarks run, on the digits and with few steps, and what they report adds up."""

import json
import signal
import statistics
import sys
import time

import helpers
import pytest
import torch

from mnist_fast.errors import RunError
from mnist_fast.model import build_network

LAUNCHING = ("scaling", "tracking_cost", "startup")
SCRIPTS = ("throughput", "notebook_baseline", "time_to_accuracy", *LAUNCHING)


@pytest.fixture(scope="module")
def throughput():
    from benchmarks import throughput

    return throughput


def bench(script, *arguments, timeout, status=0):
    path = helpers.ROOT / "benchmarks" / f"{script}.py"
    done = helpers.launch(
        *(sys.executable, path, *arguments),
        cwd=helpers.ROOT,
        timeout=timeout,
        environment={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == status, done.stderr
    return done


def test_the_floor_is_the_larger_of_computing_and_moving(throughput):
    work = throughput.work_per_image()
    macs = work["flops"] / 2
    assert 2.5e6 < macs < 3.5e6  # 1.07 million forward, twice that backward but for the images
    fast = {"flops_bf16": 1e30, "flops_no": 1e30, "bytes_per_second": 1e9}
    moved = work["accesses"] * 2 + 784
    assert throughput.floor_seconds(1000, "bf16", fast) == pytest.approx(1000 * moved / 1e9)
    slow = {"flops_bf16": 1e6, "flops_no": 2e6, "bytes_per_second": 1e30}
    assert throughput.floor_seconds(10, "no", slow) == pytest.approx(10 * work["flops"] / 2e6)


def test_the_activations_are_those_of_the_layer_table(throughput):
    from mnist_fast.model import layer_table

    sizes = [
        layer.output_shape[0] * layer.output_shape[1] * layer.output_shape[2]
        for layer in layer_table(build_network())
        if layer.name == "Conv2d"
    ]
    assert throughput.work_per_image()["accesses"] == 5 * sum(sizes)


def test_the_baseline_is_the_notebooks(throughput):
    """torch's own dropout, torchvision's transforms, one image at a time."""
    from benchmarks import notebook_baseline

    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(64) % 10
    dataset = notebook_baseline.Images(images, labels, notebook_baseline.notebook_transforms())
    image, label = dataset[3]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    assert label == 3
    dropouts = [m for m in notebook_baseline.notebook_network().modules() if "Dropout" in str(m)]
    assert {type(m) for m in dropouts if not list(m.children())} == {torch.nn.Dropout}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_the_options(script):
    done = bench(script, "--help", timeout=100)
    assert "usage:" in done.stdout
    assert "default:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "fault"),
    [
        *((script, ["--rounds", 0], "argument --rounds: '0'") for script in LAUNCHING),
        ("scaling", ["--epochs", 1], "give at least 2"),
        ("scaling", ["--run_dir", "mine"], "--run_dir is chosen here"),
        ("scaling", ["--processes", 3], "not divisible by 3 processes"),
        ("scaling", ["--learning_rate", -1], "learning_rate is -1"),
        ("throughput", ["--data_dir", "nowhere"], "nowhere"),
        ("throughput", ["--minutes", "nan"], "argument --minutes: 'nan'"),
        ("time_to_accuracy", ["--from_epochs", 99], "no schedule has that"),
        ("time_to_accuracy", ["--batch_sizes", 100], "no schedule has that"),
        ("time_to_accuracy", ["--seeds", -1], "argument --seeds: '-1'"),
        ("time_to_accuracy", ["--step", "fast"], "step"),
        ("notebook_baseline", ["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(script, arguments, fault, small_betons, tmp_path):
    """Also where train.py refuses an option, but for Accelerate's launcher's own traceback."""
    if "--data_dir" not in arguments:
        arguments = [*arguments, "--data_dir", small_betons]
    out = () if script == "notebook_baseline" else ("--out", tmp_path)
    done = bench(script, *arguments, *out, timeout=100, status=2)
    assert fault in done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "notebook_baseline"])
def test_a_folder_that_cannot_be_written_is_refused_first(script, small_betons, tmp_path):
    (tmp_path / "file").write_text("mine")
    options = ("--data_dir", small_betons, "--out", tmp_path / "file")
    done = bench(script, *options, timeout=100, status=2)
    assert "choose another --out" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_scaling_keeps_the_batch_or_the_images_of_each_process():
    from benchmarks import scaling

    cases = scaling.list_cases([4, 1, 2, 2], 64)
    assert [case.scaling for case in cases] == ["single", "strong", "weak", "strong", "weak"]
    assert [case.processes for case in cases] == [1, 2, 2, 4, 4]
    assert {case.batch_size for case in cases if case.scaling != "weak"} == {64}
    assert {case.share for case in cases if case.scaling != "strong"} == {64}
    assert scaling.default_counts(6, 64) == [1, 2, 4]
    assert scaling.default_counts(6, 48) == [1, 2, 4, 6]


def test_the_first_epoch_does_not_count_as_speed(tmp_path):
    from benchmarks import scaling

    epochs = [(100, 1), (1, 300), (3, 100)]  # seconds, images per second
    lines = [json.dumps({"epoch_seconds": s, "images_per_second": i}) for s, i in epochs]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert scaling.read_speed(tmp_path / "metrics.jsonl") == 600 / 4


@pytest.mark.slow
def test_scaling(small_betons, tmp_path):
    options = ("--processes", 1, 2, "--batch_size", 64, "--rounds", 1, "--data_dir", small_betons)
    train = ("--dataset", "digits", "--step", "eager")
    done = bench("scaling", *options, *train, "--out", tmp_path, timeout=280)
    record = json.loads((tmp_path / "scaling-cpu.json").read_text())
    assert (record["backend"], record["n"]) == ("gloo", 1)
    single, strong, weak = record["results"]
    assert (single["speedup"], single["efficiency"], single["exchange_share"]) == (1, 1, None)
    for row, size in ((strong, 64), (weak, 128)):
        assert (row["processes"], row["batch_size"], row["step"]) == (2, size, "eager")
        (speed,), (apart,) = row["images_per_second"], row["images_per_second_apart"]
        assert row["speedup"] == pytest.approx(speed / single["images_per_second"][0])
        assert row["efficiency"] == pytest.approx(row["speedup"] / 2)
        assert row["exchange_share"] == pytest.approx(1 - speed / apart)
        assert f"| {row['scaling']} | 2 | {size} |" in done.stdout
    assert (tmp_path / "scaling-cpu.png").stat().st_size > 5000


def test_what_is_launched_ends_with_the_benchmark(monkeypatch):
    from benchmarks import records

    monkeypatch.setattr(records, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    launched = []

    def launch_one_that_is_deaf():
        with records.launch([sys.executable, "-c", code]) as process:
            launched.append(process)
            while not helpers.in_signal_mask(process.pid, "SigIgn", signal.SIGTERM):
                time.sleep(0.02)
            with records.time_limit(1):
                process.wait()

    with pytest.raises(RunError, match="not finished after 1 s: see --run_timeout"):
        launch_one_that_is_deaf()
    assert launched[0].returncode == -signal.SIGKILL


@pytest.mark.slow
def test_throughput(small_betons, tmp_path):
    options = ("--quick", "--images", 256, "--rounds", 2, "--data_dir", small_betons)
    done = bench("throughput", *options, "--out", tmp_path, timeout=280)
    record = json.loads((tmp_path / "throughput-cpu.json").read_text())
    rows = record["results"]
    names = {row["name"] for row in rows}
    assert {"notebook pipeline", "FFCV stream alone", "DataLoader alone", "ours, fast"} <= names
    assert record["epoch_images"] == 1437
    baseline = next(row for row in rows if row["name"] == "notebook pipeline")
    for row in rows:
        assert row["n"] == len(row["seconds"]) == 2
        assert row["median_seconds"] == statistics.median(row["seconds"])
        if row["name"].startswith("ours"):
            ratio = baseline["median_seconds"] / row["median_seconds"]
            assert row["times_faster_than_baseline"] == pytest.approx(ratio)
            floor = record["floor_seconds"][row["precision"]]
            assert row["times_the_floor"] == pytest.approx(row["median_seconds"] / floor)
        assert row["name"] in done.stdout
    assert (tmp_path / "throughput-cpu.png").stat().st_size > 5000


@pytest.mark.slow
def test_time_to_accuracy(small_betons, tmp_path):
    options = ("--quick", "--seeds", 2, "--target", 5, 99.99, "--step", "eager")
    done = bench(
        "time_to_accuracy", *options, "--data_dir", small_betons, "--out", tmp_path, timeout=200
    )
    record = json.loads((tmp_path / "time_to_accuracy-cpu-5.0-99.99.json").read_text())
    (row,) = record["tried"]
    assert row["n"] == 2
    assert len(row["held_out"]) == 3
    assert row["mean_seconds"] == pytest.approx(statistics.fmean(row["seconds"]))
    assert len(row["accuracies"]) == 2  # that seeds differ: test_seeds_start_over
    assert set(record["reached"]) == {"5.0"}
    assert "99.99 %: not reached" in done.stdout
    options = ("--quick", "--target", 99.99, "--step", "eager", "--data_dir", small_betons)
    bench("time_to_accuracy", *options, "--out", tmp_path, timeout=200)
    record = json.loads((tmp_path / "time_to_accuracy-cpu-99.99.json").read_text())
    (row,) = record["tried"]  # held-out images said no: the test set was not read
    assert len(row["held_out"]) == 3
    assert (row["n"], row["accuracies"], row["mean_accuracy"]) == (0, [], None)


@pytest.mark.slow
def test_startup(small_betons, tmp_path):
    options = ("--epochs", 1, "--dataset", "digits", "--data_dir", small_betons)
    done = bench("startup", "--rounds", 1, "--out", tmp_path, *options, timeout=200)
    record = json.loads((tmp_path / "startup.json").read_text())
    (run,) = record["runs"]
    assert 0 < run["first_step"] < run["whole"]
    assert run["floor"] > 0
    assert 0 < run["overhead"] < run["whole"]
    parts = run.keys() - {"floor", "whole", "overhead", "first_step"}
    assert sum(run[part] for part in parts) == pytest.approx(run["whole"])
    assert record["overhead_by_floor"] == pytest.approx(run["overhead"] / run["floor"])
    assert run == record["medians"]
    assert "times the floor" in done.stdout


def test_seeds_start_over(small_betons, runtime):
    """A seed's run does not depend on the one before it, though all share one step."""
    import dataclasses

    from benchmarks.in_turn import Trainer
    from benchmarks.throughput import load_images
    from benchmarks.time_to_accuracy import timed_run
    from mnist_fast.cli import load

    config = dataclasses.replace(load(["--epochs", "1", "--batch_size", "256"]), step="eager")
    trainer = Trainer(config, runtime, load_images(small_betons))
    states = []
    for seed in (1, 2, 1):
        timed_run(trainer, seed)
        states.append(trainer.state.save([])["network/layers.0.weight"])
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])
