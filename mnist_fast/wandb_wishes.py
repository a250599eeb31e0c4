"""What a run's user wants of W&B, wherever that is said.

An option comes before a variable (`WANDB_MODE` and so on), a variable before the files that `wandb
offline`, `wandb disabled` and `wandb login` write. Variables and files are read by W&B's client.
"""

import dataclasses
import math
import os
import re
from typing import Any

from mnist_fast.config import Config
from mnist_fast.errors import one_line

PROJECT = "mnist_fast"
INIT_TIMEOUT = 10.0  # seconds that W&B may take to start; WANDB_INIT_TIMEOUT wins
FINISH_TIMEOUT = 6.0  # and to upload what is left at the end; WANDB_FINISH_TIMEOUT wins
YES = {"1", "on", "t", "true", "y", "yes"}  # W&B's words for it
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # ids that a checkpoint can hold
MODES = {"dryrun": "offline", "run": "online", "shared": "online"}  # other names of W&B's modes
FIELDS = {  # of W&B's settings, by argument of `wandb.init`
    **{name: f"run_{name}" for name in ("name", "job_type", "group", "tags", "notes")},
    **{name: name for name in ("project", "entity")},
}


@dataclasses.dataclass
class Wishes:
    """How W&B is to be started.

    Attributes:
        mode: online, offline or disabled.
        identity: what the run is called: arguments of `wandb.init`.
        settings: W&B's settings, ours where the user has no wish.
        init_timeout: seconds that the user gives W&B to start, or None.
        silent: whether the user wants W&B to say nothing.
        faults: what W&B refuses, each in a line; the run is kept offline for it.
    """

    mode: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    init_timeout: float | None
    silent: bool
    faults: list[str]


def is_disabled(option: str) -> bool:
    """Whether option or variables want no W&B at all; W&B need not be imported to know."""
    mode, disabled = (
        os.environ.get(name, "").strip().lower() for name in ("WANDB_MODE", "WANDB_DISABLED")
    )
    return option == "disabled" or (option == "auto" and (mode == "disabled" or disabled in YES))


def read_wishes(wandb: Any, config: Config, name: str) -> Wishes:
    """What the user wants.

    Args:
        wandb: the module; this starts its service.
        config: of the run.
        name: the run's, where the user gives it none.
    """
    faults = _drop_invalid_variables(wandb, config.wandb)
    given = wandb.setup().settings
    wanted = {name: getattr(given, name) for name in given.model_fields_set}
    ours = {"silent": True, "console": "off", "init_timeout": INIT_TIMEOUT}
    ours |= {"finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}
    settings = {key: wanted.get(key, value) for key, value in ours.items()}
    identity = _identity(config, name)
    for argument in [*identity]:
        if fault := _fault(wandb, FIELDS[argument], identity[argument]):
            faults.append(f"{argument} {identity.pop(argument)}: {fault}")
    identity.setdefault("project", PROJECT)
    if not ID.fullmatch(os.environ.get("WANDB_RUN_ID", "none")):
        faults.append("WANDB_RUN_ID: it is not made of up to 64 of A-Z a-z 0-9 _ -")
    mode: str = config.wandb
    if mode == "auto" and "mode" in wanted:
        mode = MODES.get(wanted["mode"], wanted["mode"])
    if faults and mode != "disabled":
        mode = "offline"
    if mode in ("auto", "online"):
        wandb.setup(wandb.Settings(mode="online", **settings))
        mode = _online_with_key(wandb, mode, faults)
    silent = bool(wanted.get("silent"))
    return Wishes(mode, identity, settings, wanted.get("init_timeout"), silent, faults)


def _online_with_key(wandb: Any, mode: str, faults: list[str]) -> str:
    """Online where W&B has a key, else offline: W&B's client would ask for one and wait."""
    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
        if mode == "online":
            faults.append("there is no key: run `wandb login` or set WANDB_API_KEY")
    except Exception as error:  # a key that cannot be one
        faults.append(one_line(error)[:300])
    return "offline"


def _drop_invalid_variables(wandb: Any, option: str) -> list[str]:
    """Takes variables that W&B refuses out of the environment, where they keep it from starting.

    Returns:
        A line for each: its name and W&B's reason, never its value, which may be a key.
    """
    faults = []
    for name, value in [*os.environ.items()]:
        if not name.startswith("WANDB_"):
            continue
        try:
            settings = wandb.Settings()
            settings.update_from_env_vars({name: value})
            read = [getattr(settings, field) for field in settings.model_fields_set]
            if not all(math.isfinite(number) for number in read if isinstance(number, float)):
                raise ValueError("it must be a finite number")
        except Exception as error:
            del os.environ[name]
            if not (name == "WANDB_MODE" and option != "auto"):  # it is not asked then
                faults.append(f"{name}: {_reason(error)}")
    return faults


def _identity(config: Config, name: str) -> dict[str, Any]:
    """What the run is called; what is not given W&B takes from the environment by itself."""
    tags = [tag.strip() for tag in (config.wandb_tags or "").split(",")]
    given = {
        "project": config.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT,
        "name": config.wandb_name or os.environ.get("WANDB_NAME") or name,
        "job_type": config.wandb_job_type or os.environ.get("WANDB_JOB_TYPE") or "train",
        "entity": config.wandb_entity,
        "group": config.wandb_group,
        "tags": [tag for tag in tags if tag],
        "notes": config.wandb_notes,
    }
    return {key: value for key, value in given.items() if value}


def _fault(wandb: Any, field: str, value: Any) -> str | None:
    """Why W&B refuses a setting, or None."""
    try:
        wandb.Settings(**{field: value})
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """W&B's reason in one line: of a validator's words those without the value."""
    if errors := getattr(error, "errors", None):
        return " ".join(str(errors()[0]["msg"]).split())
    return one_line(error)[:300]
