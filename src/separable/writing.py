"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Give each path a temporary name beside it, and rename all once the body is done.

    Whatever the body raises, Ctrl-C included, leaves nothing behind.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: a path is a folder.
    """
    # a link stays one
    real = {path: path.resolve() if path.is_symlink() else path for path in paths}
    partial = {
        path: target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        for path, target in real.items()
    }
    modes = {path: _usual_mode(path, temporary) for path, temporary in partial.items()}
    try:
        yield partial
        for path, temporary in partial.items():
            temporary.chmod(modes[path])  # some writers let nobody else read theirs
            os.replace(temporary, real[path])
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def _usual_mode(path: Path, temporary: Path) -> int:
    """The permissions of the file that is replaced, or of a new one there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for {path.name!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file")
    if path.exists():
        if not path.is_file():
            raise FileExistsError(f"{str(path)!r} is no regular file; name one")
        return stat.S_IMODE(path.stat().st_mode)
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    temporary.unlink()
    return mode


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for one path; gives its temporary name."""
    target = Path(path)
    with whole_files([target]) as partial:
        yield partial[target]
