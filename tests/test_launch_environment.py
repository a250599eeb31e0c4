"""What other launchers leave in the environment."""

import helpers
import pytest

from mnist_fast.errors import InputError
from mnist_fast.launch_environment import check_accelerate, check_launch_environment

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "environment",
    [
        {},
        TORCHRUN,
        TORCHRUN | {"PMI_SIZE": "4", "PMI_RANK": "3"},  # torchrun inside an MPI job
        {"PMI_SIZE": "1", "PMI_RANK": "0"},  # a single task of Slurm with pmi2
        {"WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_complete_environments_pass(environment, gpu):
    check_launch_environment(environment, gpu)


@pytest.mark.parametrize(
    "environment, gpu, told",
    [
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, False, "PMI_SIZE=4, PMI_RANK=2 without MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "OMPI_COMM_WORLD_SIZE=2 without MASTER_ADDR"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, False, "MV2_COMM_WORLD_SIZE=2 without MASTER_ADDR"),
        ({"LOCAL_RANK": "0"}, False, "LOCAL_RANK=0 without MASTER_ADDR"),
        ({"LOCAL_RANK": "0"}, True, "LOCAL_RANK=0 without MASTER_ADDR, MASTER_PORT, RANK, WORLD"),
        ({"LOCAL_RANK": "0", "MASTER_ADDR": "a", "RANK": "0"}, True, "without MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, False, "WORLD_SIZE=2 without MASTER_ADDR"),
        (TORCHRUN | {"RANK": "x"}, False, "RANK has to be a whole number from 0 on"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, True, "LOCAL_WORLD_SIZE has to be a whole number"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, False, "MASTER_PORT=abc is no port"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, True, "MASTER_PORT=65536 is no port"),
        ({"PMI_SIZE": ""}, False, "PMI_SIZE has to be a whole number from 1 on"),
    ],
)
def test_others_are_named_with_the_way_out(environment, gpu, told):
    with pytest.raises(InputError) as caught:
        check_launch_environment(environment, gpu)
    message = str(caught.value)
    assert told in message
    places = [name for name in environment if not name.startswith("MASTER")]
    assert all(name in message.split("unset ")[1].split(";")[0].split() for name in places)
    assert "start with accelerate launch, torchrun or slurm/train.sh" in message


def test_mpi_on_gpus_is_not_read_by_accelerate():
    check_launch_environment({"PMI_SIZE": "4", "PMI_RANK": "2"}, gpu=True)


@pytest.mark.parametrize("environment", [{"PMI_SIZE": "2"}, {"LOCAL_RANK": "0"}])
def test_a_run_says_so_in_one_line(tmp_path, small_betons, environment):
    where = ("--data_dir", small_betons, "--run_dir", tmp_path / "run")
    done = helpers.train_script(*helpers.QUICK, *where, cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    (line,) = helpers.error_lines(done.stderr)
    (name,) = environment
    assert f"{name}={environment[name]} without MASTER_ADDR: " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo backend INDUCTOR"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "over 4 steps"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU is maybe: set it to true or false"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda"}, "ACCELERATE_TORCH_DEVICE is not supported"),
    ],
)
def test_what_another_projects_configuration_chose_is_refused(given, named):
    with pytest.raises(InputError, match=named):
        check_accelerate(given)


def test_what_accelerate_says_by_itself_passes():
    usual = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    check_accelerate(usual | {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"})


@pytest.mark.timeout(120)
def test_a_leftover_configuration_is_one_line(tmp_path, small_betons):
    """By the real launcher, which reads the user's file where no other is named."""
    leftover = tmp_path / "huggingface" / "accelerate" / "default_config.yaml"
    leftover.parent.mkdir(parents=True)
    leftover.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n"
        "dynamo_config:\n  dynamo_backend: INDUCTOR\n"
    )
    done = helpers.accelerate_launch(
        *(helpers.TRAIN, *helpers.QUICK, "--data_dir", small_betons),
        cwd=tmp_path,
        timeout=110,
        environment={"HF_HOME": str(tmp_path / "huggingface")},
    )
    assert done.returncode
    (line,) = helpers.error_lines(done.stderr)
    assert "dynamo backend" in line
    assert "--config_file accelerate_config.yaml" in line
