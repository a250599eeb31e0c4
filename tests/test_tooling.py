"""The way in: make, the preflight, the launch configuration, and what belongs in every file."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PREFLIGHT = ROOT / "mnist_fast" / "preflight.py"
SYNC = "sync --locked --extra export"
TARGETS = ["setup", "train", "test", "test-slow", "test-all", "test-gpu", "lint", "format"]
TARGETS += ["bench", "bench-gpu", "clean"]


def run(*command, cwd=ROOT, env=None, timeout=120):
    """Run a command without a terminal; return the completed process with its text."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tracked_files():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a clone")
    names = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z").stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def load_preflight():
    spec = importlib.util.spec_from_file_location("preflight", PREFLIGHT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# make


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_is_known_and_listed(target):
    planned = run("make", "-n", target)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.strip()
    assert re.search(rf"^make {re.escape(target)} ", run("make").stdout, re.MULTILINE)


def test_make_train_sets_up_prepares_and_launches_with_arguments():
    plan = run("make", "-n", "train", "ARGS=--epochs 1 --seed 3").stdout
    setup = plan.index("scripts/setup.sh")
    prepare = plan.index("-m data_prep --dataset auto")
    launch = plan.index("accelerate launch train.py --dataset auto --epochs 1 --seed 3\n")
    assert setup < prepare < launch
    plan = run("make", "-n", "train", "ARGS=--config mine.yaml").stdout
    assert "accelerate launch train.py  --config mine.yaml\n" in plan  # which names the data


def test_make_test_leaves_the_slow_ones_out_and_has_a_time_limit():
    assert re.search(
        r'timeout .* \d+ \S+ -m pytest -m "not slow"', run("make", "-n", "test").stdout
    )
    slow, everything = (run("make", "-n", name).stdout for name in ("test-slow", "test-all"))
    assert re.search(r"timeout .* \d+ \S+ -m pytest -m slow", slow)
    assert "-m slow" not in everything
    assert "not slow" not in everything
    assert re.search(r"timeout .* \d+ \S+ -m pytest", everything)


def test_ci_runs_every_test_once_and_fits_its_time():
    """SLURM and the faults too; all steps together have one limit."""
    text = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^step (\S+)", text, re.MULTILINE) == ["lint", "test", "test-slow"]
    (limit,) = re.findall(r"^LIMIT=(\d+)", text, re.MULTILINE)
    assert int(limit) <= 85 * 60
    for target in ("test", "test-slow"):
        (inner,) = re.findall(
            r"^timeout .* (\d+) \S+ -m pytest", run("make", "-n", target).stdout, re.M
        )
        assert int(inner) < int(limit)


def test_make_clean_keeps_data_and_runs(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [
        "data/train.beton",
        "runs/a/__pycache__/x",
        ".venv/__pycache__/x",
        "mnist_fast/model.py",
    ]
    removed = [".ruff_cache/x", "mnist_fast/__pycache__/x.pyc", "tests/deep/__pycache__/x.pyc"]
    for name in kept + removed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done = run("make", "clean", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in removed if (tmp_path / name).exists()] == []


# setup.sh, with everything that would touch the machine replaced


@pytest.fixture
def toy_clone(tmp_path):
    """The set-up scripts with a stand-in for uv and a preflight that finds nothing wrong."""
    clone = tmp_path / "clone"
    (clone / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", clone / "scripts")
    for name in ("pyproject.toml", "uv.lock"):
        (clone / name).write_text("toy\n")
    (clone / "mnist_fast").mkdir()
    for name in ("__init__.py", "preflight.py"):
        (clone / "mnist_fast" / name).write_text("")
    uv = clone / "uv"
    uv.write_text(
        "#!/bin/sh\n"
        'echo "$*" >>calls\n'
        f"mkdir -p .venv/bin && ln -sf {sys.executable} .venv/bin/python\n"
    )
    (clone / "scripts" / "find_uv.sh").write_text("#!/bin/sh\necho ./uv\n")
    (clone / "scripts" / "apt_install.sh").write_text('#!/bin/sh\necho "apt $*" >>calls\n')
    for script in [uv, *(clone / "scripts").glob("*.sh")]:
        script.chmod(0o755)
    return clone


def set_up(clone, **env):
    """Run the set-up; return its result and what it asked uv to do."""
    (clone / "calls").write_text("")
    done = run("scripts/setup.sh", cwd=clone, env=env)
    calls = (clone / "calls").read_text().splitlines()
    return done, [call for call in calls if not call.startswith("apt ")]


def test_setup_runs_once_until_the_lock_changes(toy_clone):
    done, calls = set_up(toy_clone)
    assert done.returncode == 0, done.stderr
    assert calls[-1] == SYNC
    assert set_up(toy_clone)[1] == []
    (toy_clone / "uv.lock").write_text("changed\n")
    assert set_up(toy_clone)[1][-1] == SYNC


def test_setup_repairs_an_environment_whose_python_is_gone(toy_clone):
    set_up(toy_clone)
    (toy_clone / ".venv" / "leftover").touch()
    (toy_clone / ".venv" / "bin" / "python").unlink()
    done, calls = set_up(toy_clone)
    assert done.returncode == 0, done.stderr
    assert "replacing a broken .venv" in done.stdout
    assert calls
    assert not (toy_clone / ".venv" / "leftover").exists()


def test_setup_remakes_an_environment_that_was_moved(toy_clone):
    set_up(toy_clone)
    moved = toy_clone.rename(toy_clone.parent / "moved")
    done, calls = set_up(moved)
    assert f"made for {toy_clone}" in done.stdout
    assert calls


def test_setup_finishes_an_environment_that_was_left_half_made(toy_clone):
    uv = toy_clone / "uv"
    whole = uv.read_text()
    uv.write_text(whole + "exit 1\n")
    done, _ = set_up(toy_clone)
    assert done.returncode == 2
    uv.write_text(whole)
    done, calls = set_up(toy_clone)
    assert done.returncode == 0, done.stderr
    assert calls


def test_setup_tries_once_with_a_new_environment_when_a_library_is_broken(toy_clone):
    set_up(toy_clone)
    (toy_clone / "mnist_fast" / "preflight.py").write_text("import sys; sys.exit(2)")
    (toy_clone / ".venv" / "leftover").touch()
    done, calls = set_up(toy_clone)
    assert done.returncode == 2
    assert calls.count(SYNC) == 2
    assert "cache clean ffcv" in calls
    assert not (toy_clone / ".venv" / "leftover").exists()
    assert not (toy_clone / ".venv" / ".setup-stamp").exists()


def test_setup_takes_a_self_contained_wheel_instead_of_building(toy_clone, tmp_path):
    wheel = tmp_path / f"ffcv-1.0.2-cp3{sys.version_info[1]}-linux.whl"
    wheel.touch()
    for env in ({"FFCV_WHEEL": str(wheel)}, {}):  # it is remembered
        (toy_clone / "uv.lock").write_text(str(env))
        done, calls = set_up(toy_clone, **env)
        assert done.returncode == 0, done.stderr
        assert calls[-1].startswith("pip install")
        assert calls[-1].endswith(wheel.name)
        assert SYNC not in calls
        assert set_up(toy_clone)[1] == []
    done, _ = set_up(toy_clone, FFCV_WHEEL="absent.whl")
    assert done.returncode == 2
    assert "absent.whl" in done.stderr


# The preflight


def preflight(tmp_path, files, *arguments):
    """Run the preflight with `files` (name -> source) shadowing the real packages."""
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    script = PREFLIGHT
    return run(sys.executable, script, *arguments, env={"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libturbojpeg.so.0", "libturbojpeg0-dev"),
        ("libopencv_core.so.406", "libopencv-dev"),
        ("libopencv_imgproc.so.4.5d", "libopencv-dev"),
    ],
)
def test_preflight_names_the_debian_package_of_a_missing_system_library(tmp_path, library, package):
    message = f"{library}: cannot open shared object file: No such file or directory"
    source = f"raise ImportError({message!r})\n"
    done = preflight(tmp_path, {"ffcv/__init__.py": source}, "ffcv")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert library in line
    assert f"apt-get install {package}" in line


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ModuleNotFoundError('No module named wandb', name='wandb')", "wandb is missing"),
        ("import absent_dependency.part", "absent_dependency, which wandb needs, is missing"),
        ("raise ValueError('two\\nlines')", "wandb is broken (two lines)"),
    ],
)
def test_preflight_names_a_missing_or_broken_package_in_one_line(tmp_path, source, expected):
    done = preflight(tmp_path, {"wandb.py": source}, "wandb", "yaml")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert expected in line
    assert "make setup" in line


def test_preflight_tells_mixed_torch_builds(tmp_path):
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    done = preflight(tmp_path, {"torchvision.py": source}, "torchvision")
    assert done.returncode == 2
    assert "torchvision does not fit torch" in done.stderr


def test_quick_preflight_finds_what_is_missing_without_importing(tmp_path):
    (tmp_path / "torch").mkdir()  # what is left of a package whose files are gone
    files = {"wandb.py": "raise SystemExit('imported')", "ffcv/__init__.py": ""}
    names = ["wandb", "ffcv", "no_such_library"]
    done = preflight(tmp_path, files, "--quick", *names)
    assert done.returncode == 2
    assert "imported" not in done.stderr
    assert re.search(r"ffcv is broken \(it has no compiled part", done.stderr)
    assert "no_such_library is missing" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_quick_preflight_is_content_here():
    assert load_preflight().missing_libraries(quick=True) == []


def test_a_package_named_scripts_hides_nothing(tmp_path):
    """There are several on PyPI."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").write_text("raise ImportError('another scripts')")
    done = run(sys.executable, ROOT / "train.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_it_is_an_installed_package(tmp_path):
    """Its modules are found from any folder, with no help from PYTHONPATH."""
    done = run(sys.executable, "-m", "mnist_fast.model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7,640" in done.stdout


# The launch configuration


def test_accelerate_config_asks_for_every_gpu_of_one_machine_in_bf16():
    config = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    assert config["distributed_type"] == "MULTI_GPU"
    assert config["num_processes"] == "auto"
    assert config["gpu_ids"] == "all"
    assert config["num_machines"] == 1
    assert config["mixed_precision"] == "bf16"


def launch_probe(tmp_path, *arguments, gpus):
    """Launch a script that prints its ranks, on a machine with that many pretended GPUs."""
    (tmp_path / "probe.py").write_text(
        "import os, sys\n"
        "keys = 'LOCAL_RANK', 'WORLD_SIZE', 'ACCELERATE_MIXED_PRECISION'\n"
        "sys.stdout.write('probe ' + ' '.join(os.environ.get(k, '-') for k in keys) + '\\n')\n"
    )
    (tmp_path / "launch.py").write_text(
        "import torch\n"
        f"gpus = {gpus}\n"
        "torch.cuda.is_available = lambda: gpus > 0\n"
        "torch.cuda.device_count = lambda: gpus\n"
        "torch.accelerator.is_available = lambda: gpus > 0\n"
        "torch.accelerator.device_count = lambda: gpus\n"
        "torch.accelerator.current_accelerator = lambda: torch.device('cuda')\n"
        "from accelerate.commands import launch\n"
        "launch.check_cuda_p2p_ib_support = lambda: True\n"
        "launch.main()\n"
    )
    arguments = ("--main_process_port", "0", *arguments)
    done = run(sys.executable, "launch.py", *arguments, "probe.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return sorted(re.findall(r"^probe (.*)$", done.stdout, re.MULTILINE))


def test_accelerate_config_starts_one_process_per_visible_gpu(tmp_path):
    config = ["--config_file", ROOT / "accelerate_config.yaml"]
    assert launch_probe(tmp_path, *config, gpus=3) == ["0 3 bf16", "1 3 bf16", "2 3 bf16"]


def test_accelerate_config_works_without_a_gpu(tmp_path):
    config = ["--config_file", ROOT / "accelerate_config.yaml"]
    cpus = len(os.sched_getaffinity(0))
    assert len(launch_probe(tmp_path, *config, gpus=0)) == cpus
    assert launch_probe(tmp_path, *config, "--num_processes", "1", gpus=0) == ["0 1 bf16"]


# Every file


def test_shell_scripts_pass_shellcheck_and_stop_at_the_first_error():
    scripts = [p for p in tracked_files() if p.suffix == ".sh" or p == ROOT / ".ci" / "run"]
    assert scripts
    for script in scripts:
        assert re.search(r"^set -\w*euo? pipefail$", script.read_text(), re.MULTILINE), script
        assert os.access(script, os.X_OK), f"{script} is not executable"
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (make lint installs it where it may)")
    done = run("scripts/shellcheck_all.sh")
    assert done.returncode == 0, done.stdout + done.stderr


def test_licence_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "2026 the mnist_fast authors" in text


def test_files_name_no_machine_folder_and_no_package_index():
    # Spelled in two halves, so that this file does not name them either.
    folders = [rf"/{top}/\w" for top in ("root", "home", "Users", "opt", "work", "workspace")]
    hosts = [r"pypi\." + "org", r"pythonhosted\." + "org", r"registry\." + "npmjs"]
    forbidden = re.compile(r"(?<![\w.$~})-])(?:" + "|".join(folders) + ")|" + "|".join(hosts))
    found = []
    for path in tracked_files():
        if path.name == "uv.lock":
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in forbidden.finditer(text)]
    assert found == []


def test_workflow_and_hooks_run_what_people_run():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["ci"]
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    assert job["timeout-minutes"] <= 90
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
