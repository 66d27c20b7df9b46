"""Runs, verdicts and figures as one HTML file."""

from stability_probe.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
