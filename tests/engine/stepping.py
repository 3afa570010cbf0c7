"""All steps of a scheduler."""

from mlxchat.engine.batch import Event
from mlxchat.engine.generate import Scheduler


def steps(scheduler: Scheduler, count: int = 10**9) -> list[Event]:
    """Return the events of all requests, or of so many steps."""
    events: list[Event] = []
    while not scheduler.idle and count:
        events += scheduler.step()
        count -= 1
    return events
