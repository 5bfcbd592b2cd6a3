"""Downloads of published checkpoints from the Hugging Face hub: the only module that uses the internet.

huggingface_hub does the work, and the files lie in its own cache, which other programs share. Its `hf_hub_download` begins
anew after an interruption (huggingface_hub issue 4196); its `http_get` can go on. So `http_get` writes the blob under the
name that the documented layout of the cache gives it, the sha256, and `hf_hub_download` then finds it there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from speed3r_ros.mapping.files import written_whole
from speed3r_ros.model.backbones.checkpoints import CHECKPOINTS, Checkpoint, Record, read_record, record_path

REQUIREMENT = "huggingface_hub>=1,<3"  # as in setup.py
PAGE = "https://huggingface.co"


def human(size: int) -> str:
    """A number of bytes in decimal units, as the hub shows it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def sha256_of(path: Path) -> str:
    """Hash of a file, with a progress bar on a terminal. Raises OSError."""
    digest = hashlib.sha256()
    bar = tqdm(desc="checking sha256", total=path.stat().st_size, unit="B", unit_scale=True, leave=False, disable=None)
    with bar, open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def accept(name: str) -> None:
    """Record that the user accepts the checkpoint's licence. Raises OSError when the cache cannot be written."""
    licence = CHECKPOINTS[name].licence
    if not _accepted(name):
        _write(name, Record(licence.name, datetime.now(timezone.utc).isoformat(timespec="seconds")))


def fetch(name: str) -> Record:
    """The whole and checked copy of a checkpoint, downloaded unless it is on this machine.

    A copy that another program left in the hub's cache counts. An interrupted download goes on where it stopped.
    Raises ValueError with one line that says what to do, OSError when the cache cannot be written.
    """
    checkpoint = CHECKPOINTS[name]
    record = _accepted(name)
    if record is None:
        raise ValueError(
            f"the licence of {name} is not accepted yet ({checkpoint.licence}): read {checkpoint.licence.url}, "
            f"then `speed3r weights fetch {name} --accept-licence`"
        )
    if _whole(Path(record.path), record.sha256, checkpoint):
        return record
    try:
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise ValueError(f"downloads need huggingface_hub: pip install '{REQUIREMENT}'") from error
    page = f"{PAGE}/{checkpoint.hub}"
    again = "run the same command again, it goes on where it stopped"
    try:
        path, sha256 = _in_cache(checkpoint) or _download(checkpoint)
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(f"{name} is not on this machine and HF_HUB_OFFLINE is set: unset it to download") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"the hub refuses {checkpoint.hub} (HTTP {status}): accept its form at {page}, then `hf auth login`"
            ) from error
        if status == 404:
            raise ValueError(f"the hub has no {checkpoint.file} in {checkpoint.hub} (HTTP 404): see {page}") from error
        raise ValueError(f"the hub fails with HTTP {status}: later, {again}") from error
    except errors.HTTPError as error:  # of the HTTP library below, whose name depends on the version
        reason = str(error) or type(error).__name__
        raise ValueError(f"no connection to {constants.ENDPOINT} ({reason}): check the network and {again}") from error
    except OSError as error:
        if error.errno is None:  # of the library, not of the system
            raise ValueError(f"the download was cut off: {again}") from error
        raise
    path = path.absolute()  # HF_HOME may be relative
    record = replace(record, path=str(path), size=path.stat().st_size, sha256=sha256, revision=path.parent.name)
    _write(name, record)
    return record


def _accepted(name: str) -> Record | None:
    record = read_record(name)
    return record if record and record.licence == CHECKPOINTS[name].licence.name else None


def _write(name: str, record: Record) -> None:
    path = record_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(asdict(record), indent=2) + "\n")


def _whole(path: Path, sha256: str, checkpoint: Checkpoint) -> bool:
    if not path.is_file() or checkpoint.exact and path.stat().st_size != checkpoint.size:
        return False
    return sha256_of(path) == sha256


def _in_cache(checkpoint: Checkpoint) -> tuple[Path, str] | None:
    """Path and sha256 of a whole copy in the hub's cache, found without the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(checkpoint.hub, checkpoint.file)
    if not isinstance(found, str) or not os.path.islink(found):
        return None
    sha256 = os.path.basename(os.readlink(found))  # the link leads to a blob with this name
    return (Path(found), sha256) if _whole(Path(found), sha256, checkpoint) else None


def _download(checkpoint: Checkpoint) -> tuple[Path, str]:
    """Path and sha256 of the file, downloaded into the hub's cache. Raises ValueError, OSError and the library's errors."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    hub, name = checkpoint.hub, checkpoint.file
    metadata = get_hf_file_metadata(hf_hub_url(hub, name))
    sha256, size, commit = metadata.etag or "", metadata.size, metadata.commit_hash
    if not (re.fullmatch("[0-9a-f]{64}", sha256) and size and commit):
        raise ValueError(f"{constants.ENDPOINT} states no sha256 for {name} of {hub}: check HF_ENDPOINT and proxies")
    if checkpoint.exact and size != checkpoint.size:
        raise ValueError(
            f"{name} of {hub} has {size} bytes on the hub, but {checkpoint.size} when this program was written: "
            f"update speed3r_ros, or get the file from {PAGE}/{hub} and give its path"
        )
    blob = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub, repo_type="model") / "blobs" / sha256
    if not _whole(blob, sha256, checkpoint):
        _fill(blob, hf_hub_url(hub, name, revision=commit), size)
    return Path(hf_hub_download(hub, name, revision=commit)), sha256


def _fill(blob: Path, url: str, size: int) -> None:
    """Download `size` bytes to `blob`, whose name is their sha256, or go on with that. `blob` changes only when all is right."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.incomplete")
    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{partial}: another process is downloading this file; wait for it") from error
        done = file.tell()
        if done > size:
            file.truncate(done := 0)
        free = shutil.disk_usage(blob.parent).free
        if size - done > free:
            lack = f"needs {human(size - done)}, {human(free)} are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {lack}", str(blob.parent))
        label = url.rsplit("/", 1)[-1]
        http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=size, displayed_filename=label)
        file.flush()
        found = sha256_of(partial)
        if found != blob.name:
            partial.unlink()
            raise ValueError(f"{url} came with sha256 {found}, expected {blob.name}; run the same command again")
        os.replace(partial, blob)
