"""The manifest that lies beside two betons: what they hold, and how to tell that they still do."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnist_fast.errors import InputError
from mnist_fast.files import read_file

FORMAT = 1
SPLITS = ("train", "test")
DATASETS = ("mnist", "digits")  # those that need no --source
CUSTOM = "custom"  # data that is none of the published sets, and that the user did not name
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")  # of a data set: it names folders and runs
CLASSES = 10
IMAGE_SHAPE = (1, 28, 28)
MANIFEST_NAME = "manifest.json"
_CHECKSUM = "checksum"  # key of the manifest's own
_MAX_BYTES = 1_000_000  # of a manifest.json, which has about 2,000


@dataclass(frozen=True)
class Split:
    """One beton: `train.beton` or `test.beton`.

    Attributes:
        file: plain file name, in the manifest's folder.
        samples: number of images.
        label_histogram: number of images of each of the ten classes.
        pixel_mean: mean of all pixels, on a scale of 0 to 1.
        pixel_sd: their standard deviation (population), on the same scale.
        bytes: size of the file.
        sha256: of the file, in hexadecimal.
    """

    file: str
    samples: int
    label_histogram: tuple[int, ...]
    pixel_mean: float
    pixel_sd: float
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of betons holds and where it came from.

    Attributes:
        format: version of the betons' and this file's layout.
        dataset: `mnist`, `digits`, another published data set, `custom`, or the user's own name.
        published: whether images and labels are exactly the published ones.
        image_shape: channels, rows and columns of an image.
        train: the training set.
        test: the test set.
        source_origin: where the source files were found, in words.
        source_checksums: IDX file name to the MD5 of its content, in whatever form it came.
        versions: program name to version.
    """

    format: int
    dataset: str
    published: bool
    image_shape: tuple[int, int, int]
    train: Split
    test: Split
    source_origin: str
    source_checksums: dict[str, str]
    versions: dict[str, str]

    def splits(self) -> dict[str, Split]:
        """Both splits by name, train first."""
        return {name: getattr(self, name) for name in SPLITS}

    def to_json(self) -> str:
        """The text of `manifest.json`; the checksum in it is that of the other keys."""
        document = asdict(self)
        checksum = hashlib.sha256(json.dumps(document).encode()).hexdigest()
        return json.dumps(document | {_CHECKSUM: checksum}, indent=2) + "\n"


def load_manifest(folder: Path) -> Manifest:
    """Reads `folder/manifest.json`, strictly.

    Raises:
        InputError: it is missing, unreadable, malformed, or not of this version.
    """
    path = Path(folder) / MANIFEST_NAME
    content = b""
    try:
        content = read_file(path, _MAX_BYTES)
        manifest = _manifest(json.loads(content))
        if manifest.to_json().encode() != content:
            raise ValueError("it is not as it was written")
        return manifest
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {remedy(folder)}") from None
    except OSError as error:
        fault = f"{path} cannot be read: {error.strerror}"
        raise InputError(f"{fault}: move it away, or check its permissions") from None
    except (ValueError, RecursionError) as error:
        named = re.search(rb'"dataset": "([^"]*)"', content)
        dataset = named.group(1).decode(errors="replace") if named else ""
        known = dataset if NAME.fullmatch(dataset) else None
        how = remedy(folder, known, b'"published": false' not in content)
        if not _may_be_ours(content):  # data_prep would leave it as it is
            how = f"move it away, and {how}"
        raise InputError(f"{path} is not a valid manifest ({error}): {how}") from None


def is_foreign(folder: Path) -> bool:
    """Whether `folder/manifest.json` is there, and not even a damaged one of ours."""
    try:
        content = read_file(Path(folder) / MANIFEST_NAME, _MAX_BYTES)
    except FileNotFoundError:
        return False
    except OSError:  # a pipe, a folder, not readable: leave it alone
        return True
    return not _may_be_ours(content)


def _may_be_ours(content: bytes) -> bool:
    keys = (b'"format"', b'"image_shape"', b'"source_checksums"')
    return content == b"" or any(key in content for key in keys)


def check(folder: Path) -> Manifest:
    """Compares size and sha256 of both betons with the manifest; takes about 0.1 s for MNIST.

    Raises:
        InputError: the manifest is not valid, or a beton is missing, truncated, altered or swapped.
    """
    manifest = load_manifest(folder)
    for split in manifest.splits().values():
        path = Path(folder) / split.file
        how = remedy(folder, manifest.dataset, manifest.published)
        if not path.is_file():
            raise InputError(f"{path} is missing: {how}")
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size != split.bytes:
                    raise InputError(
                        f"{path} has {size:,} bytes but {split.bytes:,} in the manifest: {how}"
                    )
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror}: check its permissions"
            ) from None
        if sha256 != split.sha256:
            raise InputError(f"{path} is not what was written (its sha256 differs): {how}")
    return manifest


def data_sha256(manifest: Manifest) -> str:
    """One checksum for the pair of betons: sha256 over the two sha256, train first."""
    return hashlib.sha256((manifest.train.sha256 + manifest.test.sha256).encode()).hexdigest()


def remedy(folder: Path, dataset: str | None = None, published: bool = True) -> str:
    """What to do about betons that are not as they were written.

    Args:
        folder: theirs.
        dataset: what they hold; None where that is not known, and the folder's name may say it.
        published: whether they were written from the published files.
    """
    dataset = dataset or (folder.name if folder.name in DATASETS else "")
    if not dataset:
        source = "" if published else " --source ROOT"
        command = f"python -m data_prep --dataset NAME{source} --out {folder}"
        return f"run `{command}`, NAME being {' or '.join(DATASETS)}, to write it anew"
    if dataset in DATASETS and published:
        return f"run `python -m data_prep --dataset {dataset} --out {folder}` to write it anew"
    command = f"python -m data_prep --source ROOT --name {dataset} --out {folder}"
    return f"run `{command}` to write it anew from the same files"


def _manifest(document: Any) -> Manifest:
    """A manifest from its JSON document; raises ValueError that names the key at fault."""
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    if document.get("format") != FORMAT:
        raise ValueError(f"format {document.get('format')!r} instead of {FORMAT}")
    document = {key: value for key, value in document.items() if key != _CHECKSUM}
    _require_keys(document, Manifest, "")
    dataset = document["dataset"]
    _require(isinstance(dataset, str) and NAME.fullmatch(dataset) is not None, "dataset")
    _require(isinstance(document["published"], bool), "published")
    _require(document["image_shape"] == list(IMAGE_SHAPE), "image_shape")
    _require(isinstance(document["source_origin"], str), "source_origin")
    for key in ("source_checksums", "versions"):
        table = document[key]
        _require(isinstance(table, dict), key)
        _require(all(isinstance(value, str) for value in table.values()), key)
    splits = {name: _split(name, document[name]) for name in SPLITS}
    return Manifest(**{**document, "image_shape": IMAGE_SHAPE, **splits})


def _split(name: str, document: Any) -> Split:
    _require(isinstance(document, dict), name)
    _require_keys(document, Split, f"{name}.")
    # The name is fixed, so a manifest cannot point outside its folder or at the other split.
    _require(document["file"] == f"{name}.beton", f"{name}.file")
    for key in ("samples", "bytes"):
        _require(_is_count(document[key]) and document[key] > 0, f"{name}.{key}")
    for key in ("pixel_mean", "pixel_sd"):
        value = document[key]
        _require(isinstance(value, float) and 0 <= value <= 1, f"{name}.{key}")
    histogram = document["label_histogram"]
    _require(isinstance(histogram, list) and len(histogram) == CLASSES, f"{name}.label_histogram")
    _require(all(map(_is_count, histogram)), f"{name}.label_histogram")
    _require(sum(histogram) == document["samples"], f"{name}.label_histogram")
    sha256 = document["sha256"]
    _require(isinstance(sha256, str), f"{name}.sha256")
    _require(re.fullmatch("[0-9a-f]{64}", sha256) is not None, f"{name}.sha256")
    return Split(**{**document, "label_histogram": tuple(histogram)})


def _require_keys(document: Mapping[str, Any], kind: type, prefix: str) -> None:
    wanted = set(kind.__annotations__)
    for problem, keys in (("no", wanted - set(document)), ("unknown", set(document) - wanted)):
        if keys:
            raise ValueError(f"{problem} key {prefix}{min(keys)}")


def _require(condition: bool, key: str) -> None:
    if not condition:
        raise ValueError(f"{key} has a value it cannot have")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
