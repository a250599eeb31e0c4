"""Makes imports cheaper."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def plain_dictionaries() -> Iterator[None]:
    """Makes an import of FFCV inside the block 4 s faster.

    At its import it fills one of numba's dictionaries, which numba compiles for that; only the
    decoders of RGB images, of which we have none, read it.
    """
    from numba import typed

    compiled = typed.Dict
    typed.Dict = dict
    try:
        yield
    finally:
        typed.Dict = compiled
