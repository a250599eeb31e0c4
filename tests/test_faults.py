"""What clusters do to a run: each fault has a time limit and an outcome that is asserted."""

import contextlib
import importlib
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults
import helpers
import pytest
from fake_wandb import Server
from faults import newest, same_weights, started, started_ranks, status
from slurm_cluster import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = (*helpers.QUICK, "--recipe", "notebook", "--ema_decay", "0.98", "--threads", "1")
EPOCHS = 4
KILLS = 30


@pytest.fixture(scope="module")
def options(small_betons):
    return (*OPTIONS, "--data_dir", small_betons, "--epochs", str(EPOCHS))


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory):
    """Folder of a run that nothing disturbs, and the seconds it took."""
    folder = tmp_path_factory.mktemp("reference")
    with started(folder, "--epochs", "0") as process:  # so that the server has started
        assert process.wait() == 2
    begun = time.monotonic()
    with started(folder, *options, "--run_dir", folder / "run") as process:
        assert process.wait() == 0, process.said()
    return folder / "run", time.monotonic() - begun


@pytest.fixture
def tmpfs(tmp_path):
    """A function that mounts a file system of that many kB at tmp_path/disk."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *more):
        option = ",".join((f"size={size}k", *more))
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], timeout=20)
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], timeout=20, stderr=subprocess.DEVNULL)


# 1. Killed


@pytest.mark.timeout(900)
def test_killed_at_random_moments(options, reference, tmp_path):
    undisturbed, seconds = reference
    moments = random.Random(4)
    kills, runs = 0, 1
    while kills < KILLS:
        run = tmp_path / f"run-{runs}"
        with started(tmp_path, *options, "--run_dir", run) as process:
            process.process.join(moments.uniform(0.3, 1.1) * seconds)
            if process.process.exitcode is None:
                process.signal(signal.SIGKILL)
            ended = process.wait()  # it may have ended by itself in the last moment
            if ended == -signal.SIGKILL:
                kills += 1
                checkpoints = faults.checkpoint.newest_first(run / "checkpoints")
                assert not checkpoints or newest(run)
                assert len(checkpoints) == len(
                    [
                        path
                        for path in checkpoints
                        if faults.checkpoint.load(path, faults.check_state)
                    ]
                )
            else:
                assert ended == 0, process.said()
                assert same_weights(run, undisturbed)
                runs += 1
                seconds *= 0.9  # the undisturbed run may have had a slow moment
    with started(tmp_path, *options, "--run_dir", run) as process:
        assert process.wait() == 0, process.said()
    assert same_weights(run, undisturbed)


# 2. Asked to stop


def slow_save():
    """Says that a checkpoint is being written, and takes its time."""
    module = importlib.import_module("mnist_fast.checkpoint")
    write = module._write_files

    def write_slowly(*arguments):
        print("saving", flush=True)
        for _ in range(20):
            time.sleep(0.05)
        write(*arguments)

    module._write_files = write_slowly


def held():
    """Waits within the third epoch, of twelve steps each, until `go_on` is called."""

    def hold():
        print("held", flush=True)
        deadline = time.monotonic() + faults.LIMIT
        while not Path("go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    tamper_step(hold, step=30)


def go_on(process):
    """Lets a run that is held go on."""
    process.log.with_name("go").touch()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name
)
@pytest.mark.parametrize(
    "moment, tamper, times",
    [("held", held, 1), ("held", held, 2), ("saving", slow_save, 2)],
    ids=["within an epoch", "twice", "during a save"],
)
def test_stopped(options, reference, tmp_path, number, moment, tamper, times):
    run = tmp_path / "run"
    options = (*options, "--run_dir", run)
    with started(tmp_path, *options, tamper=tamper) as process:
        process.wait_for_line(moment)
        for _ in range(times):
            process.signal(number)
            time.sleep(0.05)
        go_on(process)
        assert process.wait() == 1
        assert len(process.errors()) == 1
        assert "stopped on request at step" in process.errors()[0]
        assert "Traceback" not in process.said()
    assert status(run) == "stopped"
    assert f"at step {newest(run)};" in process.errors()[0]
    with started(tmp_path, *options) as process:
        assert process.wait() == 0, process.said()
    assert status(run) == "finished"
    assert same_weights(run, reference[0])


@pytest.fixture(scope="module")
def reference_of_two(options, tmp_path_factory):
    """Folder of a run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("two")
    with started_ranks(folder, *free_ports(1), *options, "--run_dir", folder / "run") as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].said()
    return folder / "run"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_one_of_two_processes_is_asked_to_stop(options, reference_of_two, tmp_path, rank, number):
    """Both stop at the same step and go on to the same weights."""
    options = (*options, "--run_dir", tmp_path / "run")
    with started_ranks(tmp_path, *free_ports(1), *options, tampers=(held, None)) as processes:
        processes[0].wait_for_line("held")
        processes[rank].signal(number)
        go_on(processes[0])
        assert [process.wait() for process in processes] == [1, 1]
        assert "stopped on request at step" in processes[0].errors()[0]
        assert not processes[1].errors()
    assert status(tmp_path / "run") == "stopped"
    with started_ranks(tmp_path, *free_ports(1), *options) as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].said()
        assert "resumed at epoch" in processes[0].said()
    assert same_weights(tmp_path / "run", reference_of_two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.parametrize("delay", [0, 3])
def test_stopped_during_the_imports(options, tmp_path, number, delay):
    run = tmp_path / "run"
    process = helpers.start(
        *(sys.executable, helpers.TRAIN, *options, "--run_dir", run, "--epochs", "500"),
        cwd=tmp_path,
    )
    try:
        while not helpers.in_signal_mask(process.pid, "SigCgt", number):
            assert process.poll() is None
        time.sleep(delay)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=faults.LIMIT)
    finally:
        helpers.end(process)
    assert process.returncode == 1, stderr
    assert len(helpers.error_lines(stderr)) == 1
    assert "Traceback" not in stderr


def test_stopped_while_the_data_is_prepared(tmp_path):
    where = ("--data_dir", tmp_path / "betons", "--run_dir", tmp_path / "run")
    with started(tmp_path, *OPTIONS, *where) as process:
        while not list(tmp_path.glob("betons/.staging-*")):
            assert process.process.is_alive(), process.said()
            time.sleep(0.02)
        process.signal(signal.SIGTERM)
        assert process.wait(20) == 1
        assert "before the first step" in process.errors()[0]
    assert not list(tmp_path.glob("betons/.staging-*"))


# 3. Disks


def fill(path):
    """Writes until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up(options, reference, tmpfs, tmp_path):
    run = tmpfs(400) / "run"
    options = (*options, "--run_dir", run)
    filler = tmp_path / "disk" / "filler"
    with started(tmp_path, *options, tamper=held) as process:
        process.wait_for_line("held")
        fill(filler)
        go_on(process)
        assert process.wait() == 1
        assert len(process.errors()) == 1
        assert "No space left on device" in process.errors()[0]
        assert "Traceback" not in process.said()
    assert (newest(run), status(run)) == (24, "failed")
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True, timeout=20)
    with started(tmp_path, *options) as process:
        assert process.wait() == 0, process.said()
    assert same_weights(run, reference[0])


@pytest.mark.parametrize("size", [8, 40])
def test_a_disk_that_is_full_from_the_start(options, tmpfs, tmp_path, size):
    run = tmpfs(size) / "run"
    with started(tmp_path, *options, "--run_dir", run) as process:
        assert process.wait() in (1, 2)
        assert len(process.errors()) == 1
        assert "No space left on device" in process.errors()[0]
        assert "Traceback" not in process.said()


@pytest.mark.parametrize("output", ["a closed pipe", "/dev/full"])
def test_training_goes_on_without_standard_output(options, reference, tmp_path, output):
    reader, writer = os.pipe()
    os.close(reader)
    if output == "/dev/full":
        os.close(writer)
        writer = os.open(output, os.O_WRONLY)
    command = [sys.executable, helpers.TRAIN, *options, "--run_dir", tmp_path / "run"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on without it") == 1
    assert "Traceback" not in done.stderr
    assert same_weights(tmp_path / "run", reference[0])


def test_a_read_only_run_folder(options, tmpfs, tmp_path):
    run = tmpfs(64, "ro") / "run"
    with started(tmp_path, *options, "--run_dir", run) as process:
        assert process.wait() == 2
        assert "Read-only file system" in process.errors()[0]


def test_betons_on_a_full_disk(tmpfs, tmp_path):
    out = tmpfs(2_000) / "betons"
    done = helpers.launch(
        *(sys.executable, "-m", "data_prep", "--dataset", "digits", "--out", out),
        cwd=helpers.ROOT,
        timeout=faults.LIMIT,
    )
    assert done.returncode == 2, done.stderr
    assert len(helpers.error_lines(done.stderr, "data_prep")) == 1
    assert not (out / "manifest.json").exists()


# 4. Bits and lengths (those of checkpoints: test_checkpoint.py)


def test_no_flipped_bit_of_the_betons_is_trained_on(small_betons, tmp_path):
    from data_prep.betons import check
    from mnist_fast.errors import InputError

    folder = tmp_path / "betons"
    shutil.copytree(small_betons, folder)
    chance = random.Random(4)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=path.name):
                check(folder)
            path.write_bytes(content[: chance.randrange(len(content))])
            with pytest.raises(InputError, match=path.name):
                check(folder)
        path.write_bytes(content)
    check(folder)


# 5. and 6. One of two processes


def forever_waiting():
    """Stops this process in its sixth step, as SIGSTOP from outside would."""
    tamper_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def killed():
    tamper_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def raising():
    def fail():
        raise ValueError("a fault of this process alone")

    tamper_step(fail)


def tamper_step(action, step=6):
    """Does something before a step; the first is number 1."""
    module = importlib.import_module("mnist_fast.steps.base")
    steps, call = iter(range(1, 10_000)), module.BackpropStep.run

    def tampered(self, *arguments):
        if next(steps) == step:
            action()
        return call(self, *arguments)

    module.BackpropStep.run = tampered


def not_a_number():
    """Makes one image of this process's part not a number."""
    module = importlib.import_module("mnist_fast.steps.base")
    prepare = module.BackpropStep.inputs

    def tampered(self, *arguments):
        inputs = prepare(self, *arguments)
        inputs[0] = float("nan")
        return inputs

    module.BackpropStep.inputs = tampered


def loader_raises():
    """Makes FFCV's thread raise in the middle of an epoch."""
    module = importlib.import_module("ffcv.loader.epoch_iterator")
    calls, run_pipeline = iter(range(10_000)), module.EpochIterator.run_pipeline

    def tampered(self, *arguments):
        if next(calls) >= 20:
            raise ValueError("a fault of the loader")
        return run_pipeline(self, *arguments)

    module.EpochIterator.run_pipeline = tampered


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("tamper", [killed, forever_waiting, raising])
def test_one_of_two_processes_is_lost(options, tmp_path, rank, tamper):
    tampers = [tamper if rank == number else None for number in range(2)]
    where = ("--run_dir", tmp_path / "run", "--process_timeout", "15")
    with started_ranks(tmp_path, *free_ports(1), *options, *where, tampers=tampers) as processes:
        other = processes[1 - rank]
        assert other.wait(faults.LIMIT) == 1, other.said()
        assert len(other.errors()) == 1
        assert "another process was lost or does not answer" in other.errors()[0]
        assert "Traceback" not in other.said()
        if tamper is raising:
            assert processes[rank].wait() == 1
            assert "ValueError: a fault of this process alone" in processes[rank].said()
    assert status(tmp_path / "run") == (
        "running" if rank == 0 and tamper is not raising else "failed"
    )


def test_a_launcher_leaves_nobody_behind(options, tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    where = ("--run_dir", tmp_path / "run", "--epochs", "500", "--process_timeout", "15")
    process = helpers.start(
        *(sys.executable, *command, helpers.TRAIN, *options, *where),
        cwd=tmp_path,
        environment={"ACCELERATE_USE_CPU": "true"},
    )
    reader = threading.Thread(target=process.communicate, daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + faults.LIMIT
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
        os.kill(int(children[-1]), signal.SIGSTOP)
        reader.join(faults.LIMIT)
        assert process.returncode not in (None, 0)
        assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]
    finally:
        helpers.end(process)


def test_not_a_number_on_one_process_stops_both(options, tmp_path):
    where = ("--run_dir", tmp_path / "run")
    tampers = (None, not_a_number)
    with started_ranks(tmp_path, *free_ports(1), *options, *where, tampers=tampers) as processes:
        assert [process.wait() for process in processes] == [1, 1]
        assert "the loss is nan in epoch 1" in processes[0].errors()[0]
    assert status(tmp_path / "run") == "failed"
    assert newest(tmp_path / "run") is None


def test_a_loader_thread_that_raises(options, tmp_path):
    where = ("--run_dir", tmp_path / "run", "--feed", "stream")
    with started(tmp_path, *options, *where, tamper=loader_raises) as process:
        assert process.wait() == 1
        assert "FFCV's loader thread died" in process.errors()[0]
    assert status(tmp_path / "run") == "failed"


# 7. W&B


def dead_service():
    """Kills W&B's own process at the third step."""

    def kill_service():
        children = subprocess.run(
            ["pgrep", "-f", "wandb-core", "-g", str(os.getpgid(0))], capture_output=True, text=True
        ).stdout.split()
        ours = subprocess.run(
            ["pgrep", "-P", str(os.getpid())], capture_output=True, text=True
        ).stdout.split()
        for pid in {*children, *ours}:
            with contextlib.suppress(ProcessLookupError):  # pgrep itself
                os.kill(int(pid), signal.SIGKILL)

    tamper_step(kill_service)


@pytest.mark.parametrize("fault", ["unreachable", "wrong key", "no folder", "service dies"])
def test_training_goes_on_without_wandb(options, reference, tmp_path, fault):
    run = tmp_path / "run"
    environment, mode, tamper = {"WANDB_BASE_URL": "http://127.0.0.1:9"}, "offline", None
    if fault in ("unreachable", "wrong key"):
        environment["WANDB_API_KEY"] = "a" * 40 if fault == "unreachable" else "not a key"
        mode = "online"
    if fault == "no folder":
        run.mkdir()
        (run / "wandb").write_text("a file where W&B wants its folder")
    if fault == "service dies":
        tamper = dead_service
    options = (*options, "--run_dir", run, "--wandb", mode)
    with started(tmp_path, *options, environment=environment, tamper=tamper) as process:
        assert process.wait(2 * faults.LIMIT) == 0, process.said()
    assert len(helpers.read_records(run)) == EPOCHS
    assert status(run) == "finished"
    assert same_weights(run, reference[0])


@pytest.mark.parametrize("fault", ["goes away", "falls silent"])
def test_training_goes_on_when_wandbs_server_is_lost(options, reference, tmp_path, fault):
    run = tmp_path / "run"
    with Server() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        choices = (*options, "--run_dir", run, "--wandb", "online")
        with started(tmp_path, *choices, environment=environment, tamper=held) as process:
            process.wait_for_line("W&B shows this run at")
            process.wait_for_line("held")
            asked = len(server.asked)
            server.go_away() if fault == "goes away" else server.fall_silent()
            go_on(process)
            assert process.wait(2 * faults.LIMIT) == 0, process.said()
            assert "Traceback" not in process.said()
            assert process.said().count("W&B did not get everything; upload later: wandb sync") == 1
        assert any("UpsertBucket" in line for line in server.asked[:asked])
    assert len(helpers.read_records(run)) == EPOCHS
    assert status(run) == "finished"
    assert same_weights(run, reference[0])


@pytest.mark.parametrize("moment", ["from the start", "within the run"])
def test_a_full_disk_for_wandb_alone(options, reference, tmpfs, tmp_path, moment):
    disk, run = tmpfs(2_000), tmp_path / "run"
    run.mkdir()
    (disk / "wandb").mkdir()
    (run / "wandb").symlink_to(disk / "wandb")
    choices = (*options, "--run_dir", run, "--wandb", "offline")
    if moment == "from the start":
        fill(disk / "filler")
    with started(tmp_path, *choices, tamper=held) as process:
        process.wait_for_line("held")
        if moment == "within the run":
            assert list(disk.glob("wandb/offline-run-*"))
            fill(disk / "filler")
        go_on(process)
        assert process.wait(2 * faults.LIMIT) == 0, process.said()
        assert "Traceback" not in process.said()
    assert os.statvfs(disk).f_bavail == 0
    assert len(helpers.read_records(run)) == EPOCHS
    assert status(run) == "finished"
    assert same_weights(run, reference[0])


# 8. Bad input


def test_a_port_in_use(options, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.listen()
        where = ("--run_dir", tmp_path / "run", "--process_timeout", "15")
        with started_ranks(tmp_path, port, *options, *where) as processes:
            first = processes[0]  # the other talks to whoever has the port
            assert first.wait() == 1
            assert f"port {port} is in use" in first.errors()[0]
            assert "Traceback" not in first.said()


def test_a_batch_that_two_processes_cannot_share(options, tmp_path):
    where = ("--run_dir", tmp_path / "run", "--batch_size", "65")
    with started_ranks(tmp_path, *free_ports(1), *options, *where) as processes:
        assert [process.wait() for process in processes] == [2, 2]
        assert "65 is not divisible by 2" in processes[0].errors()[0]
        assert not processes[1].errors()


def test_a_second_run_in_a_folder(options, tmp_path):
    run = tmp_path / "run"
    with started(tmp_path, *options, "--run_dir", run, "--epochs", "500") as first:
        first.wait_for_line("epoch  1/")
        (tmp_path / "second").mkdir()
        with started(tmp_path / "second", *options, "--run_dir", run) as second:
            assert second.wait() == 2
            assert "another process trains in" in second.errors()[0]
        assert status(run) == "running"
        first.signal(signal.SIGTERM)
        assert first.wait() == 1
    assert newest(run)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-was-executed",)


def test_a_checkpoint_with_a_pickle_is_passed_over(options, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    (run / "summary.json").unlink()
    for path in faults.checkpoint.newest_first(run / "checkpoints"):
        (path / "tensors.safetensors").write_bytes(pickle.dumps(Payload()))
    with started(tmp_path, *options, "--run_dir", run) as process:
        assert process.wait() == 0
        assert process.said().count("skipped a checkpoint") == 2
    assert not (tmp_path / "payload-was-executed").exists()
    assert same_weights(run, reference[0])
