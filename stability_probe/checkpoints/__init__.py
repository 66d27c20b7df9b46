"""Any checkpoint to a module: what is in the file, how it is read safely, and what fits it."""

from stability_probe.checkpoints.load import Checkpoint, load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]
