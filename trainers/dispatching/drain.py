"""Stops running jobs at a checkpoint before a shutdown, so that no step is repeated after the restart."""

import sys
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from events.actors import NAMESPACE
from trainers.dispatching.dispatcher_actor import NAME

ANSWER_S = 15.0
"""Seconds that the dispatcher has for its answer, beyond the drain's own time-out."""


def drain(timeout_s: float) -> int:
    """Drains the service on the Ray cluster that this process is connected to. Afterwards nothing starts for ten
    minutes, unless the dispatcher is restarted.

    Returns the exit code: 0 when no job runs any more; 1 when some still run after `timeout_s`, or may do so. Those go
    on from their last checkpoint.
    """
    try:
        dispatcher: Any = ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        return _say("there is no dispatcher on this cluster, so no job is running", 0)
    call = dispatcher.drain.remote(timeout_s)
    try:
        running: list[str] = ray.get(call, timeout=timeout_s + ANSWER_S)
    except GetTimeoutError:
        ray.cancel(call)  # or the dispatcher would drain as soon as it can, and nothing would start for ten minutes
        told = "it hangs, or has just been started and can't reach the event log"
        return _say(f"the dispatcher does not answer: {told}; jobs that run go on from their last checkpoint", 1)
    except RayTaskError as error:
        return _say(f"{error.cause}; jobs that run go on from their last checkpoint", 1)
    except RayActorError as error:
        return _say(f"the dispatcher does not answer: {error}", 1)
    if running:
        return _say(f"still running after {timeout_s:g} s: {' '.join(running)}", 1)
    return _say("every running job has stopped at a checkpoint", 0)


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"tunewright: {text}\n")
    return code
