"""The weights command: checkpoints of the official backbones, listed, fetched, verified and found."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path

from speed3r_ros.hub import accept, fetch, human, sha256_of
from speed3r_ros.model.backbones.checkpoints import CHECKPOINTS, locate, read_record

HELP = "list, fetch and verify the checkpoints of the official backbones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=summary, description=summary)

    action("list", "names, sizes, licences, and which are on this machine")
    given = "a name that `speed3r weights list` shows, or the path of a checkpoint"
    fetching = action("fetch", "download a checkpoint from Hugging Face, once; the only action that uses the network")
    fetching.add_argument("name", metavar="NAME", help=given)
    fetching.add_argument("--accept-licence", action="store_true", help="you have read the licence and accept it")
    action("verify", "compare size, sha256, keys and shapes").add_argument("name", metavar="NAME", help=given)
    action("path", "print where the file is").add_argument("name", metavar="NAME", help=given)


def run(options: argparse.Namespace) -> int:
    """0; 1 after one line that says what is wrong; 130 when interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.action == "list":
            print_list()
        elif options.action == "path":
            print(locate(options.name))
        elif options.action == "verify":
            verify(options.name)
        elif options.name in CHECKPOINTS:
            print_fetched(options.name, options.accept_licence)
        else:
            print(f"{locate(options.name)}: a local file, nothing to fetch")
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        where = "; make room, or set HF_HOME (files) or XDG_CACHE_HOME (records) to another folder"
        print(f"speed3r weights: {reason}{where if options.action == 'fetch' else ''}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"speed3r weights: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("speed3r weights: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def print_list() -> None:
    """A line per checkpoint. Sizes with ~ come from the number of parameters."""
    for name, checkpoint in CHECKPOINTS.items():
        size = human(checkpoint.size) if checkpoint.exact else f"~{human(checkpoint.size)}"
        record = read_record(name)
        here = "fetched" if record and Path(record.path).is_file() else "gated" if checkpoint.gated else ""
        print(f"{name:18}  {size:>8}  {here:7}  {checkpoint.hub:40}  {checkpoint.licence}")


def print_fetched(name: str, accept_licence: bool) -> None:
    """Fetch a checkpoint and tell its size, hash and path. Errors: see `hub.fetch`."""
    if accept_licence:
        licence = CHECKPOINTS[name].licence
        print(f"accepted: {licence} ({licence.url})", file=sys.stderr)
        accept(name)
    record = fetch(name)
    print(f"{name}: {human(record.size)}, sha256 {record.sha256}, {record.path}")


def verify(name: str) -> None:
    """Compare a fetched checkpoint with its record, or tell which backbones a file fits. ValueError where it differs."""
    from speed3r_ros.model.backbones.registry import build_backbone, fit, read

    path = locate(name)
    size = path.stat().st_size
    if name not in CHECKPOINTS:
        state, fits = read(path, "meta"), []
        for candidate in CHECKPOINTS:
            with suppress(ValueError):
                fit(build_backbone(candidate, "meta"), state, path, "")
                fits.append(candidate)
        if not fits:
            raise ValueError(f"{path}: keys and shapes fit none of {', '.join(CHECKPOINTS)}; give another file")
        print(f"{path}: {human(size)}, sha256 {sha256_of(path)}, fits {', '.join(fits)}")
        return
    record, checkpoint = read_record(name), CHECKPOINTS[name]
    remedy = f"run `speed3r weights fetch {name}` again"
    for expected in [record.size] + checkpoint.exact * [checkpoint.size]:
        if size != expected:
            raise ValueError(f"{path}: {size} bytes, expected {expected}; {remedy}")
    sha256 = sha256_of(path)
    if sha256 != record.sha256:
        raise ValueError(f"{path}: sha256 is {sha256}, expected {record.sha256}; {remedy}")
    fit(build_backbone(name, "meta"), read(path, "meta"), path, checkpoint.remedy)
    print(f"{name}: {human(size)}, sha256 {sha256}, keys and shapes as expected, {path}")
