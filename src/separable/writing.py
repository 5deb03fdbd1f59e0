"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Give each path a temporary name beside it, and rename all once the body is done.

    Whatever the body raises, Ctrl-C included, leaves nothing behind.
    """
    partial = {path: path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}") for path in paths}
    try:
        yield partial
        for path, temporary in partial.items():
            os.replace(temporary, path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for one path; gives its temporary name."""
    target = Path(path)
    with whole_files([target]) as partial:
        yield partial[target]
