"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


@contextmanager
def whole_files(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Give each path a temporary name beside it, and rename all once the body is done.

    Whatever the body raises, Ctrl-C included, leaves nothing behind.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: a path is a folder.
    """
    planned = {path: _Planned.of(path) for path in paths}
    try:
        yield {path: each.temporary for path, each in planned.items()}
        for each in planned.values():
            each.temporary.chmod(each.mode)  # some writers let nobody else read theirs
            os.replace(each.temporary, each.target)
    finally:
        for each in planned.values():
            each.temporary.unlink(missing_ok=True)


class _Planned(NamedTuple):
    """Where a file is written, where it goes then, and the permissions it gets."""

    temporary: Path
    target: Path
    mode: int

    @classmethod
    def of(cls, path: Path) -> _Planned:
        target = path.resolve() if path.is_symlink() else path  # a link stays one
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(target.parent)!r} for {path.name!r}")
        if target.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder; name a file")
        if target.exists() and not target.is_file():
            raise FileExistsError(f"{str(path)!r} is no regular file; name one")
        # the start of a name that may be as long as names can be, and what tells it from others
        short = f"{target.stem[:40]}-{zlib.crc32(os.fsencode(target.name)):08x}"
        temporary = target.with_name(f".{short}.{secrets.token_hex(4)}{target.suffix}")
        if target.exists():
            return cls(temporary, target, stat.S_IMODE(target.stat().st_mode))
        temporary.touch()  # a new one gets what is usual there
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        return cls(temporary, target, mode)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for one path; gives its temporary name."""
    target = Path(path)
    with whole_files([target]) as partial:
        yield partial[target]
