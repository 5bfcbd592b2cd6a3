"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """Give a new, empty folder, which takes the place of `path` on success and is removed on any failure.

    Its last component already is that of `path`, for contents that name their folder. Raises OSError.
    """
    path = Path(os.path.abspath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    new, old = beside / path.name, beside / "replaced"
    try:
        new.mkdir(parents=True)
        yield new
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
