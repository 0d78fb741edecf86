"""An event store in memory, for tests."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from events.store import NO_STREAM, Damage, Recorded, check_places


class MemoryStore:
    """See `events.store.EventStore`. Nothing survives the process."""

    def __init__(self) -> None:
        self._all: list[Recorded] = []
        self._streams: defaultdict[str, list[Recorded]] = defaultdict(list)
        self._by_id: dict[str, Recorded] = {}
        self._snapshot: bytes | None = None
        self.damage: dict[int, Damage] = {}

    def last_position(self) -> int:
        return len(self._all)

    def append(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        check_places(batch, len(self._all), lambda job_id: len(self._streams.get(job_id, ())) + NO_STREAM)
        for recorded, _body in batch:
            self._all.append(recorded)
            self._streams[recorded.job_id].append(recorded)
            self._by_id[recorded.event_id] = recorded

    def find(self, event_ids: Collection[str]) -> dict[str, Recorded]:
        return {event_id: self._by_id[event_id] for event_id in event_ids if event_id in self._by_id}

    def read_stream(self, job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        first = max(after_version + 1, 0)
        return self._streams.get(job_id, [])[first : first + limit]

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        first = max(after_position, 0)
        return self._all[first : first + limit]

    def check(self, after_position: int) -> int:
        return len(self._all)

    def snapshot(self) -> bytes | None:
        return self._snapshot

    def keep_snapshot(self, snapshot: bytes) -> None:
        self._snapshot = snapshot

    def backup(self, file: Path) -> None:
        raise OSError("a store in memory has no file to copy")

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass
