"""Reads the file in which W&B keeps a run: an independent reader, for the tests.

The file is a header and then LevelDB's log format: blocks of 32 KiB, in them pieces of a checksum
(zlib's CRC32 over type and data), a length, a type and data. A record is one full piece, or a first
one, any number of middle ones and a last one; the rest of a block too short for a piece is zeros.
"""

import json
import struct
import zlib

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024
HEADER = struct.Struct("<4sHB")  # of the file: identity, magic number, version
PIECE = struct.Struct("<IHB")  # of a piece: checksum, length, type
IDENTITY, MAGIC, VERSION = b":W&B", 0xBEE1, 0
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Damaged(Exception):
    """The file is not what W&B writes."""


def read_pieces(content):
    """Yields type and data of each piece, checked."""
    if HEADER.unpack_from(content) != (IDENTITY, MAGIC, VERSION):
        raise Damaged("not a W&B file")
    position = HEADER.size
    while position < len(content):
        left = BLOCK - position % BLOCK
        if left < PIECE.size:
            if any(content[position : position + left]):
                raise Damaged(f"no zeros at the end of a block at {position}")
            position += left
            continue
        checksum, length, kind = PIECE.unpack_from(content, position)
        start = position + PIECE.size
        data = content[start : start + length]
        if length > left - PIECE.size or len(data) < length:
            raise Damaged(f"a piece at {position} is longer than its block")
        if zlib.crc32(bytes([kind]) + data) != checksum:
            raise Damaged(f"wrong checksum at {position}")
        yield kind, data
        position = start + length


def read_records(path):
    """Yields the records of a `.wandb` file.

    Raises:
        Damaged: a checksum is wrong, or pieces stand in an order that makes no record.
    """
    parts = []
    for kind, data in read_pieces(path.read_bytes()):
        if (kind in (FULL, FIRST)) == bool(parts) or kind not in (FULL, FIRST, MIDDLE, LAST):
            raise Damaged(f"a piece of type {kind} after {len(parts)} others")
        parts.append(data)
        if kind in (FULL, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []
    if parts:
        raise Damaged("the last record has no end")


def plain(items):
    """W&B's list of keys and JSON values as a dictionary; nested keys joined by a slash."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def find(folder):
    """The one `.wandb` file of a run's folder."""
    (path,) = (folder / "wandb").glob("*run-*/run-*.wandb")
    return path
