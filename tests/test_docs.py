"""The pages: links lead somewhere, commands parse, and the README is short and true."""

import argparse
import importlib
import re
import shlex
import subprocess

import pytest
from helpers import ROOT

from mnist_fast import cli
from mnist_fast.errors import InputError

README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs/architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = [README, ROOT / "docs/running.md"]
MAX_WORDS, MAX_LINES = 1_100, 130
LINK = re.compile(r"\[((?:[^][`]|`[^`]*`)*)\]\(([^()\s]+)\)")


def name_of(path):
    return str(path.relative_to(ROOT))


# Links


def prose(text):
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def links(text):
    """Pairs of a link's text and its target; links to the web are left out."""
    return [pair for pair in LINK.findall(prose(text)) if "://" not in pair[1]]


def anchors(text):
    """What `#...` may name on a page: its headings, as GitHub turns them into anchors."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE):
        plain = LINK.sub(r"\1", heading).lower().strip()
        found.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def broken_links(page):
    """The targets of a page's links that lead nowhere."""
    for _, target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            yield target


def undefined_names(page):
    """Names in the texts of links to Python files that these do not define."""
    for label, target in links(page.read_text()):
        source = page.parent / target
        if source.suffix != ".py" or not source.exists():
            continue
        for name in re.findall(r"`([\w.]+)`", label):
            parts = [] if name.endswith(".py") else name.split(".")
            if not all(re.search(rf"(class|def) {p}\b", source.read_text()) for p in parts):
                yield name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_code_defines_what_the_link_names(page):
    assert list(undefined_names(page)) == []


def test_the_headings_of_a_page_differ():
    for page in PAGES:  # an anchor would lead to the first of them
        assert len(anchors(page.read_text())) == len(set(anchors(page.read_text())))


def test_broken_links_and_undefined_names_are_seen(tmp_path):
    (tmp_path / "code.py").write_text("class Run:\n    def train(self): ...\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c\n[x](#a-b-c) [x](#a) [x](none.md) [x](page.md#b)\n\n    [x](code.md)\n\n"
        "[`Run.train`](code.py) [`Run.stop`](code.py) [`code.py`](code.py)\n"
    )
    assert list(broken_links(page)) == ["#a", "none.md", "page.md#b"]
    assert list(undefined_names(page)) == ["Run.stop"]


# Commands


class Parsed(Exception):
    """Ends a program when its command line has been parsed."""


def commands(text):
    """The commands of a page: in its blocks of code, and between backticks."""
    blocks = re.findall(r"^(?:    |\$ )(.*)$", text, flags=re.MULTILINE)
    for line in blocks + re.findall(r"`([^`\n]+)`", prose(text)):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe: a program's output
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        words = [word.removeprefix(".venv/bin/") for word in words]
        known = words and (words[0] in CHECKS or re.match(r"scripts/\w", words[0]))
        if known and len(words) > 1 and words[1] != "...":
            yield tuple(words)


def check_train(options, folder):
    """Parses the options of train.py; the files they name are examples."""
    options = ["--help"] if options == ["--help"] else [*options]
    if "--config" in options:
        empty = folder / "empty.yaml"
        empty.write_text("")
        options[options.index("--config") + 1] = str(empty)
    if options != ["--help"]:
        cli.load(options)


def check_program(name, words, folder, monkeypatch):
    """Parses the command line of a program of ours by its own parser."""
    rest, original = [], argparse.ArgumentParser.parse_known_args

    def parse(parser, *_):
        rest.extend(original(parser, [*words])[1])
        raise Parsed

    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    with pytest.raises(Parsed):
        importlib.import_module(name).main()
    if name in ("benchmarks.seeds", "benchmarks.search"):
        check_train(rest, folder)  # they hand on what they do not know
    elif rest:
        raise InputError(f"{name}: unknown {rest}")


def check_python(words, folder, monkeypatch):
    if words[:2] == ["-m", "mnist_fast.cli"]:
        check_train(words[2:], folder)
    elif words[0] == "-m":
        name = f"{words[1]}.__main__" if words[1] == "data_prep" else words[1]
        check_program(name, words[2:], folder, monkeypatch)
    elif words[0] == "train.py":
        check_train(words[1:], folder)
    else:
        name = words[0].removesuffix(".py").replace("/", ".")
        check_program(name, words[1:], folder, monkeypatch)


def check_launch(parsed, folder):
    """Checks what a launcher made of its command line."""
    script = ROOT / parsed.training_script
    assert script.is_file(), script
    if getattr(parsed, "config_file", None):
        assert (ROOT / parsed.config_file).is_file()
    if script.name == "train.py":
        check_train(parsed.training_script_args, folder)


def check_accelerate(words, folder, _):
    from accelerate.commands.launch import launch_command_parser

    if words == ["config"]:
        return
    assert words[0] == "launch"
    if "--cpu" not in words and len(words) > 1:
        check_launch(launch_command_parser().parse_args(words[1:]), folder)


def check_torchrun(words, folder, _):
    from torch.distributed.run import get_args_parser

    check_launch(get_args_parser().parse_args(words), folder)


def check_make(words, folder, _):
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert words[0] in targets
    for word in words[1:]:
        name, _, value = word.partition("=")
        assert name in ("ARGS", "FFCV_WHEEL")
        if words[0] == "train" and name == "ARGS":
            check_train(shlex.split(value), folder)


def check_sbatch(words, folder, _):
    index = next((i for i, word in enumerate(words) if word.startswith("slurm/")), 0)
    assert (ROOT / words[index]).is_file()
    if "sweep" not in words[index]:
        check_train(words[index + 1 :], folder)


def check_wandb(words, *_):
    from wandb.cli.cli import cli as wandb

    assert words[0] in wandb.commands


CHECKS = {
    "accelerate": check_accelerate,
    "make": check_make,
    "python": check_python,
    "sbatch": check_sbatch,
    "torchrun": check_torchrun,
    "wandb": check_wandb,
}
SHOWN = sorted({words for page in WITH_COMMANDS for words in commands(page.read_text())})


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_a_command_that_a_page_shows_parses(words, tmp_path, monkeypatch):
    if words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file()
    else:
        CHECKS[words[0]]([*words[1:]], tmp_path, monkeypatch)


def test_commands_are_found():
    assert len(SHOWN) > 20
    text = (
        "    A=1 make test ARGS='-x'  # all\n`python -m data_prep` and `make`\n$ python train.py\n"
    )
    assert list(commands(text)) == [
        ("make", "test", "ARGS=-x"),
        ("python", "train.py"),
        ("python", "-m", "data_prep"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "make trian",
        "make train ARGS='--epoch 1'",
        "python train.py --stepp eager",
        "python -m mnist_fast.predicts a b",
        "python -m mnist_fast.predict a b --jsn",
        "python benchmarks/seeds.py --recipe fast --learning_rat 0.1",
        "accelerate launch tran.py",
        "accelerate launch train.py --recipe slow",
        "torchrun --nproc_per_node 2 train.py --seed one",
        "sbatch slurm/trains.sh",
        "wandb sink",
    ],
)
def test_a_wrong_command_is_seen(line, tmp_path, monkeypatch):
    (words,) = commands(f"    {line}\n")
    with pytest.raises((AssertionError, InputError, ModuleNotFoundError)):
        CHECKS[words[0]]([*words[1:]], tmp_path, monkeypatch)


# The README


def tree():
    """The paths in the README's picture of the repository."""
    parents = []
    block = README.read_text().partition("## Where things are\n\n")[2].partition("\n\n")[0]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        parents = [*parents[:depth], line.split()[0]]
        yield "".join(parents)


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.split()) <= MAX_WORDS
    assert len(text.splitlines()) <= MAX_LINES


def test_the_tree_in_the_readme_is_the_repositorys():
    shown = set(tree())
    assert {path for path in shown if not (ROOT / path).exists()} == set()
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    folders = {path.split("/")[0] + "/" for path in listed.stdout.split() if "/" in path}
    assert {folder for folder in folders if not folder.startswith(".")} <= shown


def test_every_module_is_on_the_page_about_the_architecture():
    text = ARCHITECTURE.read_text()
    modules = [*(ROOT / "mnist_fast").glob("*.py"), *(ROOT / "data_prep").glob("*.py")]
    assert {path.name for path in modules if path.name not in text} - {"__main__.py"} == set()
