"""The command line."""

from stability_probe.cli.app import main

__all__ = ["main"]
