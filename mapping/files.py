"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, renamed to it on success and removed on any failure. Raises OSError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | Path, owned: Collection[str] = ()) -> Iterator[Path]:
    """Give a new, empty folder that moves to `path` on success and vanishes on any failure. Raises OSError.

    Its last component already is that of `path`, for contents that name their folder. An existing folder stays (it may
    be a mount point); its entries give way to new ones of the same name, and those in `owned` go.
    """
    path = Path(os.path.abspath(path))
    workshop = (path if path.is_dir() else path.parent) / f".{path.name}.{os.getpid()}.partial"
    new, old = workshop / "new" / path.name, workshop / "old"
    try:
        new.mkdir(parents=True)
        old.mkdir()
        yield new
        if not path.exists():
            os.rename(new, path)
            return
        names = os.listdir(new)
        for name in {*owned, *names} & set(os.listdir(path)):
            os.rename(path / name, old / name)
        for name in names:
            os.rename(new / name, path / name)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
