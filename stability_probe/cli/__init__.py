"""The command line."""

from stability_probe.cli.main import main

__all__ = ["main"]
