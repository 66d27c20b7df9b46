"""Workers for a sweep that are this process, and die when told to."""

from contextlib import contextmanager

from stability_probe.runs.workers import Workers


class Died(BaseException):
    """What is raised in the place of a process that dies; nothing in a run may catch it."""


@contextmanager
def hire_nobody(request, runs):
    """In the place of `hire`: calls are done here, one after another."""

    def do(calls):
        for function, arguments, named in calls:
            function(*arguments, **named)

    yield Workers(1, do, (Died,))
