"""Ids: ULIDs, which sort by time."""

import re

from ulid import ULID

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def new_job_id() -> str:
    """`ftjob-` and a ULID."""
    return f"ftjob-{ULID()}"


def new_event_id() -> str:
    """Make it once per fact, before the first try to append it; every retry carries the same."""
    return str(ULID())


def ulid_time(text: str, prefix: str) -> float | None:
    """When an id of `prefix` and a ULID was made, in Unix seconds; None for any other text."""
    ulid = text.removeprefix(prefix)
    try:
        made = ULID.from_str(ulid)
    except ValueError:
        return None
    return made.timestamp if text == f"{prefix}{made}" else None


def is_job_id(text: str) -> bool:
    """Whether it may name a job: letters, digits, '-' and '_' only, so that it is also a plain file name."""
    return _JOB_ID.fullmatch(text) is not None
