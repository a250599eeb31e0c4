"""Who imports whom: downwards only, and each vendor behind one wall."""

import ast
import graphlib

import pytest
from helpers import ROOT

# Each layer imports from the ones before it; a new module needs a place. data_prep, which stands
# beside them, imports nothing of ours but the lowest layer.
LAYERS = [
    {"errors", "files", "imports", "preflight", "timing"},
    {"config", "launch_environment", "provenance", "signals"},
    {"augment", "beton", "cli", "model", "optim", "picture_files", "records", "run_folder"}
    | {"schedule", "sheet"},
    {"checkpoint", "data", "pictures", "profiling", "progress", "kernels.abi", "kernels.build"}
    | {"kernels.cpu", "kernels.hopper", "runtime", "evaluate"},
    {"datasets", "pages", "steps.base"},
    {"steps.eager", "steps.compiled", "steps.captured", "steps.native", "steps.fused"},
    {"steps"},
    {"wandb_files", "wandb_panels", "wandb_run", "wandb_wishes"},
    {"figures", "report", "resume", "tracking"},
    {"loop", "predict"},
    {"train", "export"},
]

# Within a layer only so; one more line than before is to be thought about.
SIDEWAYS = {
    "evaluate": {"runtime"},
    "kernels.cpu": {"kernels.abi", "kernels.build"},
    "kernels.hopper": {"kernels.abi", "kernels.build"},
    "progress": {"data"},
    "report": {"figures"},
    "steps.captured": {"steps.compiled"},
    "wandb_run": {"wandb_files", "wandb_panels", "wandb_wishes"},
}
DATA_PREP_FOR = {"datasets", "export"}  # who may ask for the betons
DATA_PREP = {"data_prep.betons", "data_prep.manifest"}

# Only these may import what stands in front, at the top or inside a function.
VENDORS = {
    "ffcv": {"data", "data_prep.betons"},
    "accelerate": {"runtime"},
    "wandb": {"tracking"},
}

PACKAGES = ("mnist_fast", "data_prep")
FILES = [ROOT / "train.py", *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
EMPTY = {"mnist_fast", "data_prep", "kernels"}  # importing these packages costs nothing


def name_of(path):
    """`train`, `loop`, `steps.base`, `data_prep.betons`, ...; a package is named by its folder."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts[1:] if parts[0] == "mnist_fast" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path):
    """Full names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def our_imports(path):
    """The modules of ours that a file imports, by the names of `ALLOWED`."""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] in PACKAGES:
            whole = parts[1:] if parts[0] == "mnist_fast" else parts
            names = [".".join(whole[:length]) for length in range(len(whole), 0, -1)]
            found.add(next((module for module in names if module in MODULES), parts[0]))
    return found - {"kernels"}


def layer_of(module):
    (layer,) = [number for number, layer in enumerate(LAYERS) if module in layer]
    return layer


def allowed(module):
    """What a module of ours may import of ours."""
    if module.startswith("data_prep"):
        return LAYERS[0] | {name for name in MODULES if name.startswith("data_prep")}
    data_prep = DATA_PREP if module in DATA_PREP_FOR else set()
    return set().union(*LAYERS[: layer_of(module)], SIDEWAYS.get(module, ()), data_prep)


def test_every_module_has_one_place():
    placed = [name for layer in LAYERS for name in layer]
    ours = {name for name in MODULES if not name.startswith("data_prep")} - EMPTY
    assert sorted(placed) == sorted(ours)


def test_the_layers_and_what_goes_sideways_have_no_circle():
    for module, others in SIDEWAYS.items():
        assert {layer_of(other) for other in others} == {layer_of(module)}
    tuple(graphlib.TopologicalSorter(SIDEWAYS).static_order())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    if module in EMPTY:
        assert set(imported(MODULES[module])) <= {"os"}  # importing a package costs nothing
    else:
        assert our_imports(MODULES[module]) - allowed(module) == set()


def test_the_real_imports_have_no_circle():
    graph = {name: our_imports(path) for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())
    assert {"loop", "cli"} <= graph["train"]  # else nothing was found at all


@pytest.mark.parametrize("vendor", VENDORS)
def test_each_vendor_has_one_wall(vendor):
    users = {
        name
        for name, path in MODULES.items()
        if any(full.split(".")[0] == vendor for full in imported(path))
    }
    assert users == VENDORS[vendor]


def test_an_import_inside_a_function_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def late():\n    from mnist_fast import loop\n    import wandb.sdk\n")
    assert our_imports(path) == {"loop"}
    assert "wandb.sdk" in set(imported(path))
