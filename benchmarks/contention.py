"""What other processes took of the machine while something was timed.

Three shares of a stretch of wall time are read, all from `/proc` (Linux; elsewhere there are none):

    waited  threads of this process and of its children were ready to run and did not
    stolen  the host ran another machine on these cores
    others  the cores ran processes that are not of this tree, as a share of all cores

Waiting for a disk or for a child is none of them: it belongs to what is timed.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

WAITED, STOLEN, OTHERS = 0.02, 0.02, 0.15
"""The largest shares with which a stretch counts as undisturbed."""
DISTURBED = "disturbed"
"""What is said of numbers for which hardly any pair was left, so that all count."""
_STAT, _TASKS = Path("/proc/stat"), "task/*/schedstat"


@dataclass(frozen=True)
class Reading:
    """Clocks in seconds, each since a start of its own.

    Attributes:
        wall: time on the wall.
        own: CPU time of the process tree.
        waited: time that its threads were ready and not running.
        stolen: time that the host took from the cores.
        busy: time that the cores ran anything.
    """

    wall: float
    own: float
    waited: float
    stolen: float
    busy: float


@dataclass(frozen=True)
class Taken:
    """What others took, as shares of the wall time (`waited`) or of all cores' time."""

    waited: float
    stolen: float
    others: float

    @property
    def quiet(self) -> bool:
        """Whether it was little enough.

        >>> Taken(0.0, 0.0, 0.01).quiet, Taken(0.05, 0.0, 0.01).quiet
        (True, False)
        """
        return self.waited <= WAITED and self.stolen <= STOLEN and self.others <= OTHERS


def between(before: Reading, after: Reading, cores: int) -> Taken:
    """What others took between two readings; clocks of threads that have ended count as 0.

    >>> between(Reading(0, 0, 0, 0, 0), Reading(10, 9, 1, 0, 13), cores=2)
    Taken(waited=0.1, stolen=0.0, others=0.2)
    """
    wall = max(after.wall - before.wall, 1e-9)
    strangers = (after.busy - before.busy) - (after.own - before.own)
    return Taken(
        waited=max(after.waited - before.waited, 0.0) / wall,
        stolen=max(after.stolen - before.stolen, 0.0) / (wall * cores),
        others=max(strangers, 0.0) / (wall * cores),
    )


class Meter:
    """Reads the clocks of a tree of processes and of the machine.

    Args:
        root: the process at the top of the tree; this one by default. The processes below another
            one are taken to compute at the same time and to wait for each other, so that waiting
            is not read.
    """

    def __init__(self, root: int | None = None) -> None:
        self.root, self.alone = psutil.Process(root), root is None
        self.cores = os.cpu_count() or 1
        self.works = sys.platform == "linux" and Path("/proc/self/schedstat").exists()

    def read(self) -> Reading | None:
        """The clocks now; `None` where they cannot be read."""
        if not self.works:
            return None
        own = waited = 0.0
        for process in (self.root, *self.root.children(recursive=True)):
            cpu, wait = _clocks(process)
            own, waited = own + cpu, waited + (wait if self.alone else 0.0)
        busy, stolen = _machine()
        return Reading(time.perf_counter(), own, waited, stolen, busy)

    def taken(self, before: Reading | None) -> Taken | None:
        """What others took since a reading."""
        after = self.read()
        return between(before, after, self.cores) if before and after else None


def rule() -> str:
    """What is said of pairs that were dropped."""
    if not Meter().works:
        return "No pair was dropped: this system does not say what other processes take."
    return (
        f"Pairs were dropped in which threads waited for a core over {WAITED:.0%} of the time, the "
        f"host took over {STOLEN:.0%}, or other processes had over {OTHERS:.0%} of all cores; in "
        f"{DISTURBED} rows hardly any was left, and all count."
    )


def _clocks(process: psutil.Process) -> tuple[float, float]:
    """Seconds that a process has run, and that its living threads have waited for a core."""
    try:
        times = process.cpu_times()
        cpu = time.process_time() if process.pid == os.getpid() else times.user + times.system
        tasks = list(Path(f"/proc/{process.pid}").glob(_TASKS))
        return cpu, sum(int(task.read_text().split()[1]) for task in tasks) * 1e-9
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0  # it ended meanwhile


def _machine() -> tuple[float, float]:
    """Seconds that the cores ran anything, and that the host took from them."""
    ticks = [int(number) for number in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks
    second = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / second, stolen / second
