"""Published checkpoints of the official backbones: where they come from, under which licence, and the copies on this machine.

Nothing here uses the network or torch. `speed3r weights fetch` downloads, and keeps a record of each copy in the user's cache.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Licence:
    """Name, text, and in a few words what it forbids; empty when any use is allowed."""

    name: str
    url: str
    limits: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.limits}" if self.limits else self.name


APACHE = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
CC_BY_NC = Licence("CC BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0/", "non-commercial use only")
CC_BY_NC_SA = Licence(
    "CC BY-NC-SA 4.0", "https://creativecommons.org/licenses/by-nc-sa/4.0/", "non-commercial use only"
)
VGGT = Licence(
    "VGGT License v1",
    "https://github.com/facebookresearch/vggt/blob/main/LICENSE.txt",
    "no military use, and limits on vehicles and heavy machinery",
)


@dataclass(frozen=True)
class Checkpoint:
    """One file of a repository on the Hugging Face hub."""

    hub: str
    licence: Licence
    size: int  # bytes
    exact: bool = True  # False: 4 bytes per parameter, where the size of the published file is not known
    file: str = "model.safetensors"
    gated: bool = False  # its form must be accepted on the hub first

    @property
    def remedy(self) -> str:
        """What to do about a wrong file, for the end of an error."""
        return f"give {self.file} of {self.hub} on Hugging Face"


CHECKPOINTS = {
    "pi3": Checkpoint("yyfz233/Pi3", CC_BY_NC, 3_834_909_248),
    "pi3x": Checkpoint("yyfz233/Pi3X", CC_BY_NC, 5_440_325_620),
    "speed3r-pi3": Checkpoint("weining17/Speed3R_Pi3", CC_BY_NC, 3_837_128_048, exact=False),
    "vggt-1b": Checkpoint("facebook/VGGT-1B", CC_BY_NC, 5_026_367_224),
    "vggt-1b-commercial": Checkpoint("facebook/VGGT-1B-Commercial", VGGT, 5_026_367_224, gated=True),
    "streamvggt": Checkpoint("lch01/StreamVGGT", CC_BY_NC_SA, 5_026_150_064, exact=False, file="checkpoints.pth"),
    "da3-small": Checkpoint("depth-anything/DA3-SMALL", APACHE, 137_248_940),
    "da3-base": Checkpoint("depth-anything/DA3-BASE", APACHE, 541_518_028),
    "da3-large": Checkpoint("depth-anything/DA3-LARGE-1.1", CC_BY_NC, 1_643_767_068, exact=False),
    "da3-giant": Checkpoint("depth-anything/DA3-GIANT-1.1", CC_BY_NC, 5_422_814_644),
    "da3-nested": Checkpoint("depth-anything/DA3NESTED-GIANT-LARGE-1.1", CC_BY_NC, 6_759_558_100),
    "da3-metric": Checkpoint("depth-anything/DA3METRIC-LARGE", APACHE, 1_336_734_448),
    "da3-mono": Checkpoint("depth-anything/DA3MONO-LARGE", APACHE, 1_336_685_576, exact=False),
}

SINGLE_VIEW = ("da3-metric", "da3-mono")  # they have no attention across views


def notice(name: str) -> str:
    """The line to show at every start with the backbone `name`, or "" when its licence allows any use."""
    licence = CHECKPOINTS[name].licence
    return f"weights {name} are under {licence} ({licence.url})" if licence.limits else ""


@dataclass(frozen=True)
class Record:
    """The licence that the user accepted, and the copy that was fetched under it."""

    licence: str
    accepted: str  # ISO 8601, UTC
    path: str = ""  # empty until the file is whole and has the hash
    size: int = 0  # bytes
    sha256: str = ""  # as the hub states it
    revision: str = ""  # commit of the repository on the hub


def record_path(name: str) -> Path:
    """File of the record, in the user's cache: XDG_CACHE_HOME, by default ~/.cache. ValueError without a home folder."""
    cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache / "speed3r" / "weights" / f"{name}.json"


def expanded(path: Path | str) -> Path:
    """The path with ~ or ~user replaced. ValueError with one line where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home folder; set HOME, or give a path without ~") from error


def read_record(name: str) -> Record | None:
    """What is known of the copy on this machine. ValueError when the record is damaged, OSError when it is unreadable."""
    path = record_path(name)
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged record ({error}); delete it and fetch {name} again") from error


def locate(name: Path | str) -> Path:
    """The file of a fetched checkpoint, or the one that `name` is a path of. ValueError with one line and the remedy."""
    if name not in CHECKPOINTS:
        path = expanded(name)
        if not path.exists():
            raise ValueError(
                f"no weights {str(name)!r}: choose one of {', '.join(CHECKPOINTS)}, or give the path of a file"
            )
        return find_file(path, "give the path of the file itself")
    record = read_record(str(name))
    remedy = f"run `speed3r weights fetch {name}` or give the path of a copy"
    if record is None or not record.path:
        raise ValueError(f"weights {name} are not on this machine; {remedy}")
    if not Path(record.path).is_file():
        raise ValueError(f"weights {name}: {record.path} is gone; {remedy}")
    return Path(record.path)


def checkpoint_file(name: str, path: Path | str | None = None) -> Path:
    """The file of a backbone's weights: the one that `path` is or holds, else the fetched one. ValueError with one line."""
    return locate(name) if path is None else find_file(expanded(path), CHECKPOINTS[name].remedy)


def find_file(path: Path, remedy: str) -> Path:
    """The checkpoint that `path` is, or the only one in the folder `path`. Raises ValueError with one line."""
    if not path.exists():
        raise ValueError(f"{path}: does not exist; {remedy}")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}; {remedy}")
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in SUFFIXES)
    if len(files) != 1:
        raise ValueError(f"{path}: {len(files)} checkpoints ({', '.join(SUFFIXES)}), expected one; {remedy}")
    return files[0]
