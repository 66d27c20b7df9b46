"""The one exception family of the package.

Every error that a user's input can cause is a `StabilityProbeError`; its message is one line that
names the thing, what it requires, what was received and what to do. The command line prints that
line and exits with code 2. Anything else that escapes is a defect of the package.
"""


class StabilityProbeError(ValueError):
    """Input or environment that the toolkit cannot work with; the message says what to do."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the message says at which step."""
