"""Train a model by a recipe: `python -m speed3r_ros.training RECIPE --out DIR`; on several GPUs under torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from speed3r_ros.model.config import read_yaml
from speed3r_ros.training.config import (
    CONFIGS,
    TrainingConfig,
    parse_assignment,
    require_runnable,
    settings_table,
    with_values,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when a run failed (with one line that says why), 2 for wrong settings."""
    parser = argparse.ArgumentParser(prog="python -m speed3r_ros.training", description="Train a model by a recipe.")
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, config in CONFIGS.items():
        summary = config.__doc__
        recipe = recipes.add_parser(name, help=summary, description=summary)
        recipe.add_argument("--out", type=Path, help="folder for checkpoint, weights and log")
        recipe.add_argument("--config", metavar="FILE.yaml", help="settings, as --list prints them")
        recipe.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME=VALUE",
            help="settings that go before the file's",
        )
        recipe.add_argument(
            "--resume", action="store_true", help="go on from the checkpoint in --out, with its settings"
        )
        recipe.add_argument("--list", action="store_true", help="print every setting with its default, and end")
    options = parser.parse_args(arguments)
    if options.list:
        print(settings_table(options.recipe), end="")
        return 0
    if options.out is None:
        parser.error("--out DIR: the folder for checkpoint, weights and log is missing")
    if options.resume and options.config:
        parser.error("--config: a run goes on with its own settings; leave it out, and change single ones by --set")
    try:
        config = read_config(options)
        require_runnable(options.recipe, config)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    import torch.distributed as dist

    from speed3r_ros.training.trainer import Trainer

    try:
        Trainer(options.recipe, config, options.out, options.resume).run()
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def read_config(options: argparse.Namespace) -> TrainingConfig:
    """Defaults, then the file's settings (with --resume those of the run), then --set. ValueError, OSError."""
    config = CONFIGS[options.recipe]()
    file = options.out / "config.yaml" if options.resume else options.config
    if file:
        values = read_yaml(file)
        recipe = values.pop("recipe", options.recipe)
        if recipe != options.recipe:
            raise ValueError(f"{file}: settings of the recipe {recipe!r}, not {options.recipe!r}")
        config = with_values(config, values, str(file))
    return with_values(config, dict(parse_assignment(text, config) for text in options.set))


if __name__ == "__main__":
    sys.exit(main())
