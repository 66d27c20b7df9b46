"""`python -m stability_probe`."""

from stability_probe.cli import main

main()
