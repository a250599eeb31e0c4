"""Fixtures: data sets for the tests, and an environment that holds nothing of the user's."""

import os
from pathlib import Path

import helpers
import pytest

# Batches here are too small to share among threads, which would only wait for each other on a busy
# machine. Torch reads this when it is imported; `helpers.launch` does not hand it on.
os.environ.setdefault("OMP_NUM_THREADS", "1")

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte") + (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def pytest_configure(config):
    """Hides the GPUs from all but the tests that are of GPUs: `make test-gpu` chooses these."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """What shares the costly launch comes first, so that one worker of pytest-xdist runs it all."""
    items.sort(key=lambda item: "launched_run" not in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_users(tmp_path_factory):
    """No key, no settings of W&B or accelerate, no distributed environment is picked up."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if helpers.is_foreign(name)]:
            patch.delenv(name)
        for name, folder in helpers.private_folders(home).items():
            patch.setenv(name, str(folder))
        yield


@pytest.fixture(scope="session")
def mnist_root():
    """Absolute path of the torchvision root that holds the four MNIST files."""
    variable = os.environ.get("MNIST_ROOT")
    if not variable:
        pytest.skip("needs the real MNIST: MNIST_ROOT is not set")
    root = (helpers.ROOT / Path(variable).expanduser()).resolve()
    for folder in (root / "MNIST" / "raw", root):
        if all(any(folder.glob(f"{name}*")) for name in IDX_FILES):
            return root
    pytest.skip(f"needs the real MNIST: MNIST_ROOT={variable} does not hold the four files")


@pytest.fixture(scope="session")
def small_betons(tmp_path_factory):
    """Folder of betons with the digits: 1,437 images to train and 360 to test."""
    from data_prep.betons import prepare

    folder = tmp_path_factory.mktemp("digits")
    prepare("digits", None, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def mnist_betons(mnist_root, tmp_path_factory):
    """Folder of betons with the real MNIST."""
    from data_prep.betons import prepare

    folder = tmp_path_factory.mktemp("mnist")
    prepare("mnist", mnist_root, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def trained_on_mnist(mnist_betons, tmp_path_factory):
    """Folder of a whole run of the default recipe."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = helpers.train_script(
        *("--data_dir", mnist_betons, "--run_dir", folder, "--wandb", "disabled"),
        cwd=folder.parent,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def launched_run(tmp_path_factory):
    """`accelerate launch train.py --dataset auto`, as `make train` does it, in an empty folder.

    There is no MNIST and no network. Gives the folder in which it was started, and how it ended.
    """
    folder = tmp_path_factory.mktemp("launched")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MNIST_ROOT", raising=False)
        done = helpers.accelerate_launch(
            *(helpers.TRAIN, "--dataset", "auto", "--recipe", "notebook", "--epochs", "2"),
            *("--learning_rate", "0.1", "--feed", "stream", "--wandb", "offline"),
            cwd=folder,
            timeout=300,
            environment=helpers.NO_NETWORK,
        )
    return folder, done


@pytest.fixture
def in_process():
    """For tests that train in this process: leaves no distributed or accelerate state behind."""
    with helpers.single_process():
        yield


@pytest.fixture
def runtime(in_process):
    """The one process of a run in float32."""
    from mnist_fast.config import Config
    from mnist_fast.runtime import Runtime

    runtime = Runtime(Config(precision="no"))
    runtime.set_precision("no")
    return runtime
