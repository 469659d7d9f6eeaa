"""The `lightning-accel` command: run a recipe, inspect an artifact, verify it."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lightning-accel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a recipe: a path, or a name below ./recipes")
    run.add_argument("recipe")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the recipe")
    inspect = commands.add_parser("inspect", help="manifest, coverage and figures of an artifact")
    inspect.add_argument("directory")
    inspect.add_argument("--json", action="store_true", help="the manifest as it is")
    verify = commands.add_parser("verify", help="check every file and run the golden inputs again")
    verify.add_argument("directory")
    options = parser.parse_args(arguments)
    if options.command == "run":
        return _run(options)  # an error of the recipe shows where it came from
    try:
        return {"inspect": _inspect, "verify": _verify}[options.command](options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"lightning-accel {options.command}: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    path = Path(options.recipe)
    if not path.is_file():
        path = Path("recipes") / f"{options.recipe.removesuffix('.py')}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path("recipes").glob("*.py"))) or "none here"
        print(
            f"lightning-accel run: there is no recipe {options.recipe!r}; give a path, or a name below ./recipes "
            f"({known})",
            file=sys.stderr,
        )
        return 1
    from . import _quiet  # noqa: F401  before the recipe imports transformers

    sys.argv = [str(path), *options.arguments]
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .artifact import read_manifest

    if options.json:
        print(json.dumps(read_manifest(options.directory), indent=1))
        return 0
    from .report import describe

    print(describe(options.directory))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .verify import verify_artifact

    print("\n".join(verify_artifact(options.directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
