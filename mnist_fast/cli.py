"""From recipe, YAML file and command line to a `Config`; the later ones win.

`python -m mnist_fast.cli OPTIONS` prints what options of train.py come to, and trains nothing.
"""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mnist_fast.config import EMPTY, FIELDS, Config
from mnist_fast.errors import InputError, one_line, run_main
from mnist_fast.files import read_file, say

RECIPES = Path(__file__).parent / "recipes"
MAX_FILE = 100_000  # bytes of a configuration file that are read
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """Strict YAML: no aliases, no duplicate keys, only decimal numbers, `yes` and `no` as text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases: a few of them within each other fill all memory."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:  # the last one would win
            raise yaml.YAMLError(f"duplicate key '{key}'")
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value):  # 010 would be 8, and 1:30 be 90
        raise yaml.YAMLError(f"{node.value} is not a decimal whole number")
    return loader.construct_yaml_int(node)


def _truth(loader: _Loader, node: yaml.ScalarNode) -> bool | str:
    if node.value.lower() in ("true", "false"):
        return loader.construct_yaml_bool(node)
    return node.value  # no is a precision, too; where a truth value is due, the parser reads it


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:bool", _truth)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping from a YAML file; every fault is one `InputError` that names the file."""
    try:
        content = yaml.load(read_file(path, MAX_FILE).decode(), _Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: name a readable YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: must hold lines of the form 'option: value'")
    return content


def read_recipe(name: str) -> dict[str, Any]:
    """The choices of a recipe by name."""
    if name not in recipe_names():
        raise InputError(f"--recipe {name}: unknown, the recipes are {', '.join(recipe_names())}")
    return read_yaml(RECIPES / f"{name}.yaml")


def build_parser() -> Any:
    """A parser with one option per field of `Config`, and --config."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="train.py", exit_on_error=False, allow_abbrev=False, description=DESCRIPTION
    )
    parser.add_argument("--config", type=str | None, default=None, help="YAML file with options")
    recipe = read_recipe(Config.recipe)  # what a run without options takes
    for field in FIELDS.values():
        default = recipe.get(field.name, field.default)
        help_text = field.metadata["help"]
        parser.add_argument(f"--{field.name}", type=field.type, default=default, help=help_text)
    return parser


DESCRIPTION = """Trains the network. Choices come from the recipe, then the configuration file,
then the options, each overriding the one before. The defaults shown are those of the default
recipe."""


def load(arguments: Sequence[str] | None = None) -> Config:
    """Resolves a command line into a `Config`.

    Args:
        arguments: the command line without the program's name; default: that of this process.

    Raises:
        InputError: an unknown option or key, a wrong type, a value out of range, a bad file.
    """
    parser = build_parser()
    given = _options_given(parser, list(sys.argv[1:] if arguments is None else arguments))
    if given.get("config") == "":
        raise InputError(f"config {EMPTY}")
    from_file = read_yaml(Path(given["config"])) if given.get("config") else {}
    values = _checked(parser, str(given.get("config")), from_file)
    recipe = given.get("recipe", values.get("recipe", Config.recipe))
    values = _checked(parser, f"recipe {recipe}", read_recipe(recipe)) | values
    values |= {name: value for name, value in given.items() if name != "config"}
    for name in ("data_dir", "run_dir", "resume"):  # a shell leaves the ~ of --run_dir=~/x
        if values.get(name):
            values[name] = os.path.expanduser(values[name])
    return Config(**(values | {"recipe": recipe}))


def _options_given(parser: Any, arguments: list[str]) -> dict[str, Any]:
    """The options given on the command line, as typed values."""
    from jsonargparse import ArgumentError

    try:
        namespace = parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        raise InputError(f"{_readable(error)}; see train.py --help") from error
    return dict(namespace.as_dict())


def _checked(parser: Any, where: str, layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's values, converted to the types of their fields; unknown keys are errors."""
    from jsonargparse import ArgumentError

    for key, value in layer.items():
        if key not in FIELDS:
            fault = f"{where}: unknown key '{key}'{_suggestion(key)}"
            raise InputError(f"{fault}; see train.py --help")
        if value is None and FIELDS[key].default is not None:  # the parser would take it
            raise InputError(f"{where}: {key} has no value")
    try:
        checked = parser.parse_object(layer, defaults=False).as_dict()
    except ArgumentError as error:
        raise InputError(f"{where}: {_readable(error)}") from error
    return {name: checked[name] for name in layer}


def _readable(error: Exception) -> str:
    """The parser's message in words for people, with a suggestion where an option is unknown."""
    text = one_line(error)
    if unknown := re.match(r"unrecognized arguments: --([\w-]+)", text, re.IGNORECASE):
        return text + _suggestion(unknown[1])
    fault = re.fullmatch(r'Parser key "(\w+)": Expected a (.*)\. Got value: ?(.*)', text)
    if fault is None:
        return text
    name, expected, value = fault.groups()
    if not value:  # most often a shell variable that is not set
        return f"{name} {EMPTY}"
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
        words = choices[1].replace("'", "")
        return f"{name} {value}: unknown, the choices are {words}"
    kind = re.fullmatch(r"<class '(\w+)'>", expected)
    return f"{name} {value}: it must be {KINDS.get(kind[1], kind[1])}" if kind else text


def _suggestion(name: str) -> str:
    """The option that was probably meant, in words; empty where none is like it."""
    close = difflib.get_close_matches(name.replace("-", "_"), ["config", *FIELDS], n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


def dump(config: Config) -> str:
    """The resolved choices as YAML that `--config` reads again."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)


def main() -> int:
    """Prints the choices that a command line comes to, as YAML."""
    say(dump(load()).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))
