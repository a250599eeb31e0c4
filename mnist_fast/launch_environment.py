"""The variables by which launchers tell a process its place among others, and what to use."""

from collections.abc import Mapping

from mnist_fast.errors import InputError

# Each with its least value. On CPUs Accelerate reads those of MPI where torch's are missing.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LEAST = {
    **dict.fromkeys(SIZES, 1),
    **dict.fromkeys(("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS"), 1),
    **dict.fromkeys(("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"), 1),
    **dict.fromkeys(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0),
    **dict.fromkeys(("LOCAL_RANK", "MPI_LOCALRANKID"), 0),
    **dict.fromkeys(("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"), 0),
}

# What `accelerate config` of another project may have chosen, by the variable that says so
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
TRUE = ("1", "true", "yes", "on", "t", "y")  # as Accelerate reads its environment
FALSE = ("", "0", "false", "no", "off", "f", "n")


def check_accelerate(environment: Mapping[str, str]) -> None:
    """Refuses what `accelerate launch` was told to use and this suite does not support.

    Most often a configuration file of another project says so, which `accelerate launch` reads
    unless it is given another.

    Raises:
        InputError: something is chosen that would change the training, or be left out in silence.
    """
    found = {k: v for k, v in UNSUPPORTED.items() if environment.get(k, "").lower() not in FALSE}
    told = [f"{name} ({variable}={environment[variable]})" for variable, name in found.items()]
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in FALSE:
        told.append(f"the dynamo backend {dynamo} (here: --step compiled)")
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1"):
        told.append(f"gradient accumulation over {steps} steps (here: a larger --batch_size)")
    for variable in ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE"):
        value = environment.get(variable, "")
        if value.lower() not in (*TRUE, *FALSE):
            raise InputError(f"{variable} is {value}: set it to true or false, or unset it")
    if environment.get("ACCELERATE_TORCH_DEVICE"):
        raise InputError("ACCELERATE_TORCH_DEVICE is not supported: unset it")
    if told:
        remedy = "start with accelerate launch --config_file accelerate_config.yaml"
        raise InputError(
            f"accelerate launch asks for {' and '.join(told)}, which is not supported: {remedy}, "
            "or change what accelerate config wrote"
        )


def check_launch_environment(environment: Mapping[str, str], gpu: bool) -> None:
    """Refuses variables that Accelerate would misread as a place among several processes.

    Complete sets, as torchrun and `accelerate launch` make them, pass, and so does none at all.
    What another launcher or an MPI job has left is named together with the way out.

    Args:
        environment: variables and values.
        gpu: whether there is a GPU; Accelerate then looks at torch's variables alone.

    Raises:
        InputError: a value is no number, or variables are missing beside those that are set.
    """
    found = {name: environment[name] for name in LEAST if name in environment}
    told = ", ".join(f"{name}={value}" for name, value in found.items())
    remedy = (
        f"to train in one process, unset {' '.join(found)}; "
        "for several, start with accelerate launch, torchrun or slurm/train.sh"
    )
    for name, value in found.items():
        if not (value.isdecimal() and int(value) >= LEAST[name]):
            fault = f"{name} has to be a whole number from {LEAST[name]} on"
            raise InputError(f"environment: {told}: {fault}; {remedy}")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in found and size in found and int(found[rank]) >= int(found[size]):
            raise InputError(f"environment: {told}: {rank} has to be below {size}; {remedy}")
    if int(found.get("RANK", "0")) and "WORLD_SIZE" not in found:
        raise InputError(f"environment: {told} without WORLD_SIZE: {remedy}")
    if not takes_several(found, gpu):
        return
    needed = ["MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"] if gpu else ["MASTER_ADDR"]
    if missing := [name for name in needed if not environment.get(name)]:
        raise InputError(f"environment: {told} without {', '.join(missing)}: {remedy}")
    port = environment.get("MASTER_PORT", "29500")
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise InputError(f"environment: {told}: MASTER_PORT={port} is no port; {remedy}")


def takes_several(found: Mapping[str, str], gpu: bool) -> bool:
    """Whether Accelerate would join a group of processes (its `PartialState._prepare_backend`)."""
    sizes = () if gpu else SIZES
    return "LOCAL_RANK" in found or any(int(found.get(name, "1")) > 1 for name in sizes)
