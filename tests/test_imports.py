"""Who imports whom: downwards only, and each vendor behind one wall."""

import ast
import graphlib

import pytest
from helpers import ROOT

# Each layer imports from the ones before it; a new module needs a place. data_prep, which stands
# beside them, imports nothing of ours but the lowest layer.
LAYERS = [
    {"errors", "files", "imports"},
    {"config", "signals"},
    {"augment", "model", "muon", "schedule"},
    {"checkpoint", "data", "evaluate", "profiling", "progress", "report", "run_folder"}
    | {"fused", "native", "runtime", "step", "tracking"},
    {"loop", "predict"},
    {"train", "many", "export"},
]

# Within a layer only so; one more line than before is to be thought about.
SIDEWAYS = {
    "evaluate": {"runtime"},
    "fused": {"data", "native"},
    "progress": {"data"},
    "report": {"evaluate"},
    "runtime": {"fused"},
    "step": {"data", "fused", "native", "runtime"},
    "tracking": {"evaluate", "runtime"},
}
DATA_PREP_FOR = {"loop", "export"}  # who may ask for the betons

# Only these may import what stands in front, at the top or inside a function.
VENDORS = {
    "ffcv": {"data", "data_prep.betons"},
    "accelerate": {"runtime"},
    "wandb": {"tracking"},
}

FILES = [ROOT / "train.py", *(ROOT / "mnist_fast").glob("*.py"), *(ROOT / "data_prep").glob("*.py")]


def name_of(path):
    """`train`, `loop`, `data_prep.betons`, ...; `mnist_fast` and `data_prep` for the packages."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    if parts[-1] == "__init__":
        return parts[0]
    return parts[-1] if parts[0] in ("train", "mnist_fast") else ".".join(parts)


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
        package, *rest = name.split(".")
        if package in ("mnist_fast", "data_prep"):
            prefix = "data_prep." if package == "data_prep" else ""
            module = prefix + rest[0] if rest else ""
            found.add(module if module in MODULES else package)
    return found


def layer_of(module):
    (layer,) = [number for number, layer in enumerate(LAYERS) if module in layer]
    return layer


def allowed(module):
    """What a module of ours may import of ours."""
    if module.startswith("data_prep"):
        return LAYERS[0] | {name for name in MODULES if name.startswith("data_prep")}
    data_prep = {"data_prep.betons"} if module in DATA_PREP_FOR else set()
    return set().union(*LAYERS[: layer_of(module)], SIDEWAYS.get(module, ()), data_prep)


def test_every_module_has_one_place():
    placed = [name for layer in LAYERS for name in layer]
    ours = {name for name in MODULES if not name.startswith("data_prep")} - {"mnist_fast"}
    assert sorted(placed) == sorted(ours)


def test_the_layers_and_what_goes_sideways_have_no_circle():
    for module, others in SIDEWAYS.items():
        assert {layer_of(other) for other in others} == {layer_of(module)}
    tuple(graphlib.TopologicalSorter(SIDEWAYS).static_order())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    if module in ("mnist_fast", "data_prep"):
        assert set(imported(MODULES[module])) <= {"os"}  # importing a package costs nothing
    else:
        assert our_imports(MODULES[module]) - allowed(module) == set()


def test_the_real_imports_have_no_circle():
    graph = {name: our_imports(path) for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())
    assert {"loop", "config"} <= graph["train"]  # else nothing was found at all


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
