"""The command line: a thin layer over the public API. Needs the extra `cli` (typer, rich)."""
