"""Records held against theorems: verdicts with their statistics."""

from stability_probe.verify.evidence import Evidence, gather
from stability_probe.verify.verdict import Status, Verdict, verdict_table
from stability_probe.verify.verify import verify

__all__ = ["Evidence", "Status", "Verdict", "gather", "verdict_table", "verify"]
