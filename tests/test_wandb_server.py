"""W&B's real client against a server that keeps what it is sent: every epoch gets there once."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import faults
import helpers
import pytest
import wandb
import wandb_file
from fake_wandb import Server

from mnist_fast import wandb_run, wandb_wishes
from mnist_fast.cli import load
from mnist_fast.runtime import Runtime
from mnist_fast.tracking import Tracker

pytestmark = pytest.mark.timeout(300)
EPOCHS = 4
KEY = "a" * 40


def make_record(epoch, width):
    """An epoch's record; `width` numbers more make it as large as wanted."""
    record = {"epoch": epoch, "global_step": 11 * epoch, "dataset": "digits"}
    record |= {"train_loss": 1 / epoch, "test_accuracy": 50.0 + epoch, "test_loss": 2 / epoch}
    return record | {f"more_{n}": n / 7 for n in range(width)}


def track(log, options, folder, environment, epochs, killed, width):
    """Tracks epochs of a run, the ones before as from its checkpoint; then ends it or is killed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    os.chdir(folder.parent)
    config = load([*options, "--run_dir", str(folder)])
    runtime = Runtime(config)
    runtime.set_precision("no")
    tracker = Tracker(config, runtime, folder)
    tracker.start({}, [make_record(epoch, width) for epoch in range(1, epochs[0])], None)
    for epoch in epochs:
        tracker.log_epoch(make_record(epoch, width))
    if killed:
        while not tracker._wandb._queue.empty():
            time.sleep(0.05)
        time.sleep(0.5)  # W&B's own process writes what it has got
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.finish({"test_accuracy": 50.0 + epochs[-1]})


class Tracked:
    """A run whose starts are processes of their own.

    Attributes:
        said: what they printed, and the last of them.
    """

    def __init__(self, top, server=None, **environment):
        self.folder, self.log = top / "run", top / "log"
        self.environment = {"WANDB_API_KEY": KEY, **environment}
        if server is not None:
            self.environment["WANDB_BASE_URL"] = server.url

    def start(self, *options, epochs=range(1, EPOCHS + 1), killed=False, width=0, **environment):
        """Runs epochs; returns what was said."""
        words, variables = ["--dataset", "digits", *options], self.environment | environment
        arguments = (self.log, words, self.folder, variables, epochs, killed, width)
        self.log.unlink(missing_ok=True)
        process = faults._server.Process(target=track, args=arguments)
        process.start()
        process.join(120)
        process.kill()
        said = self.log.read_text() if self.log.exists() else ""
        assert process.exitcode == (-signal.SIGKILL if killed else 0), said
        assert "Traceback" not in said
        return said

    def parts(self):
        """The folders that its starts left, by name."""
        folders = [path for path in self.folder.glob("wandb/*run-*") if not path.is_symlink()]
        return sorted(folders, key=lambda path: path.name.removeprefix("offline-"))


def named_folders(said):
    """The folders that the last line about W&B names for `wandb sync`."""
    *_, last = (line for line in said.splitlines() if line.startswith("tracking: "))
    _, _, folders = last.partition("wandb sync ")
    return shlex.split(folders)


def sync(said, server):
    """Does what a run's last line says."""
    program = Path(sys.executable).with_name("wandb")
    done = helpers.launch(
        *(program, "sync", *named_folders(said)),
        cwd="/",
        timeout=100,
        environment={"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr


def assert_once(server, epochs=EPOCHS):
    """Every epoch is on the server once, in order, in one run that is over."""
    (run,) = server.runs.values()
    assert run.epochs == list(range(1, epochs + 1))
    assert not run.repeated
    steps = [line["_step"] for line in run.history]
    assert steps == sorted(set(steps))
    assert run.exit_code == 0
    assert run.summary["test_accuracy"]["last"] == 50.0 + epochs


# Kills


SMALL, LARGE = 0, 900  # a file of W&B's gets nothing of few small epochs, and most of large ones
SOONER = [(mode, 1, SMALL) for mode in ("offline", "online")]
LATER = [(mode, after, width) for mode in ("offline", "online") for after in (1, 2, 3)
         for width in (SMALL, LARGE) if (mode, after, width) not in SOONER]  # fmt: skip


@pytest.mark.parametrize(
    "mode, after, width",
    SOONER + [pytest.param(*case, marks=pytest.mark.slow) for case in LATER],
)
def test_a_killed_run_sends_every_epoch_once(mode, after, width, tmp_path):
    with Server() as server:
        run = Tracked(tmp_path, server)
        options = ("--wandb", mode)
        run.start(*options, epochs=range(1, after + 1), killed=True, width=width)
        said = run.start(*options, epochs=range(after + 1, EPOCHS + 1), width=width)
        if mode == "offline":
            assert not server.runs
            assert named_folders(said) == [str(path) for path in run.parts()]
            sync(said, server)
        assert_once(server)
        (digest,) = {path.name.rpartition("-")[2] for path in run.parts()}
        assert list(server.runs) == [digest]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_training_killed_as_an_epoch_ends_sends_every_epoch_once(
    mode, after, small_betons, tmp_path
):
    """Killed about when its checkpoint is written: it goes on after that epoch or before it."""
    with Server() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        options = ("--dataset", "digits", "--step", "eager", "--precision", "no", "--wandb", mode)
        options += ("--data_dir", small_betons, "--run_dir", tmp_path / "run", "--epochs", 8)
        with faults.started(tmp_path, *options, environment=environment) as process:
            process.wait_for_line(f"epoch  {after}/")
            process.signal(signal.SIGKILL)
            process.wait()
        with faults.started(tmp_path, *options, environment=environment) as process:
            assert process.wait() == 0, process.said()
            if mode == "offline":
                sync(process.said(), server)
        (run,) = server.runs.values()
        assert run.epochs == list(range(1, 9))
        assert not run.repeated
        accuracies = [line["test_accuracy"] for line in run.history if "train_loss" in line]
        records = helpers.read_records(tmp_path / "run")
        assert accuracies == [record["test_accuracy"] for record in records]


def test_a_run_that_goes_from_offline_to_online_sends_every_epoch_once(tmp_path):
    """The first part, which is whole, is then no longer asked for."""
    with Server() as server:
        run = Tracked(tmp_path, server)
        run.start("--wandb", "offline", epochs=[1, 2])
        run.start("--wandb", "online", epochs=[3, 4])
        assert_once(server)
        assert all(any(path.glob("*.wandb.synced")) for path in run.parts())


def test_a_run_that_is_prolonged_offline_names_both_parts(tmp_path):
    with Server() as server:
        run = Tracked(tmp_path, server)
        run.start("--wandb", "offline", epochs=[1, 2])
        said = run.start("--wandb", "offline", epochs=[3, 4])
        assert named_folders(said) == [str(path) for path in run.parts()]
        assert len(run.parts()) == 2
        sync(said, server)
        assert_once(server)


def test_a_cut_file_is_made_whole(tmp_path):
    run = Tracked(tmp_path)
    run.start("--wandb", "offline", epochs=range(1, 4), killed=True, width=LARGE)
    (path,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    with pytest.raises(wandb_file.Damaged):
        list(wandb_file.read_records(path))
    run.start("--wandb", "offline", epochs=[4], width=LARGE)
    lines = [
        record.history for record in wandb_file.read_records(path) if record.HasField("history")
    ]
    assert 1 <= len(lines) < 4


# Servers that are slow, silent or refuse


@pytest.mark.slow
def test_the_users_time_out_wins(tmp_path):
    """Without it the run is offline; with it the server that is slow has its time."""
    with Server(delay=wandb_wishes.INIT_TIMEOUT + 2) as server:
        run = Tracked(tmp_path, server)
        said = run.start("--wandb", "online", WANDB_INIT_TIMEOUT="120")
        assert "W&B shows this run at" in said
        assert_once(server)


@pytest.mark.parametrize(
    "fault",
    ["refuses", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("silent", "absent"))],
)
def test_a_server_that_does_not_serve_keeps_the_run_offline(fault, tmp_path):
    with Server(refuses=fault == "refuses") as server:
        if fault == "silent":
            server.fall_silent()
        if fault == "absent":
            server.go_away()
        run, started = Tracked(tmp_path, server), time.monotonic()
        said = run.start("--wandb", "online")
        assert said.count("W&B online failed") == 1
        assert time.monotonic() - started < 100
        (part,) = run.parts()
        assert named_folders(said) == [str(part)]
    with Server() as server:
        sync(said, server)
        assert_once(server)


@pytest.mark.parametrize(
    "options, variables",
    [
        ((), {"WANDB_BASE_URL": "nonsense"}),
        (("--wandb_project", "a/b"), {}),
        pytest.param((), {"WANDB_API_KEY": "not a key"}, marks=pytest.mark.slow),
        pytest.param((), {"WANDB_API_KEY": f" {KEY}"}, marks=pytest.mark.slow),
        pytest.param((), {"WANDB_RUN_ID": "a/b"}, marks=pytest.mark.slow),
        pytest.param((), {"WANDB_RUN_ID": "a.b"}, marks=pytest.mark.slow),
        pytest.param((), {"WANDB_PROJECT": "a?b"}, marks=pytest.mark.slow),
        pytest.param((), {"WANDB_CONSOLE": "loud"}, marks=pytest.mark.slow),
        pytest.param(("--wandb_tags", "x" * 70), {}, marks=pytest.mark.slow),
    ],
)
def test_what_wandb_refuses_keeps_the_run_offline(options, variables, tmp_path):
    with Server() as server:
        run = Tracked(tmp_path, server)
        said = run.start("--wandb", "online", *options, **variables)
        assert said.count("W&B is kept offline: ") == 1
        assert KEY not in said
        sync(said, server)
        assert_once(server)


# Wishes


@pytest.fixture
def wished(tmp_path, monkeypatch):
    """Reads the wishes in a folder with a key, without a server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")

    def read(*options, settings="", **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if settings:
            (tmp_path / "wandb").mkdir()
            (tmp_path / "wandb" / "settings").write_text(f"[default]\n{settings}\n")
        return wandb_wishes.read_wishes(wandb, load(["--dataset", "digits", *options]), "run")

    wandb.teardown()
    yield read
    wandb.teardown()


@pytest.mark.parametrize(
    "option, settings, variables, mode",
    [
        ("auto", "", {}, "online"),
        ("auto", "", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", "", {"WANDB_MODE": "run"}, "online"),
        ("auto", "", {"WANDB_MODE": "offline"}, "offline"),
        ("auto", "", {"WANDB_MODE": "nonsense"}, "offline"),
        ("auto", "mode = offline", {}, "offline"),
        ("auto", "mode = disabled", {}, "disabled"),
        ("auto", "mode = offline", {"WANDB_MODE": "online"}, "online"),
        ("online", "mode = disabled", {}, "online"),
        ("online", "", {"WANDB_MODE": "nonsense"}, "online"),
        ("offline", "mode = disabled", {"WANDB_MODE": "online"}, "offline"),
        ("auto", "", {"WANDB_API_KEY": ""}, "offline"),
        ("online", "", {"WANDB_API_KEY": ""}, "offline"),
    ],
)
def test_options_come_before_variables_and_these_before_files(
    wished, option, settings, variables, mode
):
    assert wished("--wandb", option, settings=settings, **variables).mode == mode


@pytest.mark.parametrize(
    "option, name, value, disabled",
    [
        ("auto", "WANDB_MODE", "disabled", True),
        ("auto", "WANDB_MODE", "Disabled ", True),
        ("auto", "WANDB_MODE", "dryrun", False),
        ("auto", "WANDB_DISABLED", "true", True),
        ("auto", "WANDB_DISABLED", "1", True),
        ("auto", "WANDB_DISABLED", "false", False),
        ("offline", "WANDB_DISABLED", "true", False),
        ("disabled", "WANDB_MODE", "online", True),
    ],
)
def test_what_disables_wandb_is_known_without_importing_it(
    monkeypatch, option, name, value, disabled
):
    monkeypatch.setenv(name, value)
    assert wandb_wishes.is_disabled(option) == disabled


def test_time_outs_and_silence_are_the_users(wished):
    wishes = wished(settings="silent = true", WANDB_INIT_TIMEOUT="120", WANDB_FINISH_TIMEOUT="90")
    assert (wishes.init_timeout, wishes.silent) == (120, True)
    assert wishes.settings["init_timeout"] == 120
    assert wishes.settings["finish_timeout"] == 90


@pytest.mark.parametrize("value", ["nan", "inf", "1e400"])
def test_a_time_out_without_end_is_refused_by_its_name(wished, value):
    wishes = wished(WANDB_INIT_TIMEOUT=value)
    assert wishes.faults == ["WANDB_INIT_TIMEOUT: it must be a finite number"]
    assert wishes.mode == "offline"


def test_without_wishes_time_is_short_and_wandb_itself_silent(wished):
    wishes = wished()
    assert (wishes.init_timeout, wishes.silent, wishes.faults) == (None, False, [])
    assert wishes.settings["init_timeout"] == wandb_wishes.INIT_TIMEOUT
    assert wishes.settings["silent"] is True
    end = wandb_run.CLOSE_TIMEOUT + wandb_wishes.FINISH_TIMEOUT
    assert end < 20
    assert wandb_wishes.INIT_TIMEOUT < wandb_run.OFFLINE_TIMEOUT < 20


def test_a_silent_wandb_still_says_what_failed(tmp_path):
    run = Tracked(tmp_path, WANDB_SILENT="true", WANDB_BASE_URL="nonsense")
    said = run.start("--wandb", "online", epochs=[1])
    assert said.count("tracking: ") == 1
    assert "kept offline" in said


@pytest.mark.parametrize("machine, mode", [("127.0.0.1:9", "online"), ("elsewhere", "offline")])
def test_a_key_in_the_netrc_file_is_found_without_asking(
    machine, mode, wished, tmp_path, monkeypatch
):
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine {machine}\n login user\n password {KEY}\n")
    assert wished(NETRC=str(tmp_path / "netrc")).mode == mode
