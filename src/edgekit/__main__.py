"""The `edgekit` command, also `python -m edgekit`."""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Run the command line; says how to get it where the extra `cli` is not installed."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"edgekit: the command line needs {' and '.join(missing)}; run: pip install 'edgekit[cli]'\n"
            "Without it, 'python -m edgekit.runtime' verifies, profiles and runs bundles.",
            file=sys.stderr,
        )
        return 2
    from edgekit.cli.app import run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
