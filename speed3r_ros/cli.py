"""The `speed3r` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from speed3r_ros import evaluate, reconstruct, report, weights_command
from speed3r_ros.config import dump_yaml


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; its exit code: 0, 1 when it failed (with one line that says why), 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="speed3r", description="Streaming monocular 3D reconstruction.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {"reconstruct": reconstruct, "evaluate": evaluate, "report": report, "weights": weights_command}
    for name, module in modules.items():
        summary = module.HELP
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    summary = "print the parameter file with every setting, its documentation and default"
    command = commands.add_parser("config", help=summary, description=summary)
    command.set_defaults(run=lambda _: print(dump_yaml(), end=""))
    options = parser.parse_args(arguments)
    return options.run(options) or 0


if __name__ == "__main__":
    sys.exit(main())
