"""What trackers have on disk, read without the package."""

import json
import struct
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curves = dict[str, dict[int, float]]
"""Values by name and step."""

BLOCK, HEADER = 32768, 7


def tensorboard_curves(folder: Path) -> Curves:
    """As TensorBoard shows them: what was purged is not there. Every step has one value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps), f"{name} has a step twice"
        curves[name] = {event.step: event.value for event in events.Scalars(name)}
    return curves


def wandb_curves(file: Path) -> Curves:
    """The history in a `run-ID.wandb` file, by W&B's own step."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = {}
    for text in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(text)
        if record.WhichOneof("record_type") != "history":
            continue
        row: dict[str, Any] = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in row.items():
            if not name.startswith("_"):
                assert row["_step"] not in curves.setdefault(name, {})
                curves[name][row["_step"]] = value
    return curves


def _records(data: bytes) -> list[bytes]:
    """The records of a LevelDB log: blocks of parts, each with checksum, length and kind."""
    assert data[:4] == b":W&B"
    found, parts, at = [], [], HEADER
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            found.append(b"".join(parts))
            parts = []
    return found
