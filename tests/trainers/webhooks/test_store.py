"""The store of endpoints and deliveries: what it keeps, and for how long."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.trainers.webhooks.support import TYPES
from trainers.errors import UserError
from trainers.webhooks.deliverer import Pace, Webhooks
from trainers.webhooks.store import MOST_ENDPOINTS, MOST_OLD_SECRETS, Cursor, Endpoint, Notice, Outcome, WebhookStore


def with_a_notice(tmp_path: Path) -> tuple[WebhookStore, Endpoint]:
    """A store with one endpoint, which is to be told of one event."""
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    store.note([Notice("evt_1", "fine_tuning.job.failed", "ftjob-1", 101.0)], Cursor(9, "e"), 101.0)
    return store, created


def test_an_attempt_without_a_recorded_outcome_counts_and_is_made_again(tmp_path: Path) -> None:
    """The process was killed during the attempt."""
    store, created = with_a_notice(tmp_path)
    (attempt,), due = store.claim(200.0, {}, 8, lambda attempts: 10.0 * attempts)
    assert (attempt.attempts, due) == (1, None)
    store.close()
    store = WebhookStore(tmp_path / "webhooks.db")
    assert store.claim(209.0, {}, 8, lambda attempts: 10.0 * attempts) == ([], 210.0)
    (again,), _ = store.claim(210.0, {}, 8, lambda attempts: 10.0 * attempts)
    assert (again.notice, again.attempts) == (attempt.notice, 2)
    assert store.deliveries(created.id, 10, None)[0][0].next_attempt_at == 230.0
    assert store.cursor() == Cursor(9, "e")
    store.close()


def test_pending_deliveries_to_a_disabled_endpoint_are_given_up(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    notices = [Notice(f"evt_{n}", "fine_tuning.job.failed", "ftjob-1", 101.0) for n in range(3)]
    store.note(notices, Cursor(9, "e"), 101.0)
    (first, second), _ = store.claim(200.0, {}, 2, lambda _: 10.0)
    webhooks = Webhooks.__new__(Webhooks)
    webhooks._pace = Pace()
    store.settle(first, webhooks._outcome(first, 410, "answered 410"))
    store.settle(second, webhooks._outcome(second, 500, "answered 500"))  # was on its way at the time
    found, _ = store.deliveries(created.id, 10, None)
    assert {one.status for one in found} == {"failed"}
    store.close()


def test_a_410_from_a_url_that_was_changed_does_not_disable_the_endpoint(tmp_path: Path) -> None:
    """The URL was changed while the request was on its way: it is sent to the new one."""
    store, created = with_a_notice(tmp_path)
    (old,), _ = store.claim(200.0, {}, 8, lambda _: 10.0)
    store.update(created.id, None, "http://8.8.4.4/", None, 201.0)
    webhooks = Webhooks.__new__(Webhooks)
    webhooks._pace = Pace()
    store.settle(old, webhooks._outcome(old, 410, "answered 410"))
    assert store.endpoint(created.id).enabled
    (again,), _ = store.claim(210.0, {}, 8, lambda _: 10.0)
    assert (again.url, again.notice) == ("http://8.8.4.4/", old.notice)
    store.close()


def test_a_delivery_that_arrived_stays_delivered_when_an_earlier_attempt_fails(tmp_path: Path) -> None:
    """It was redelivered while the earlier attempt hung."""
    store, created = with_a_notice(tmp_path)
    (hanging,), _ = store.claim(200.0, {}, 8, lambda _: 10.0)
    store.redeliver(created.id, "evt_1", 201.0)
    (again,), _ = store.claim(202.0, {}, 8, lambda _: 10.0)
    store.settle(again, Outcome("delivered", 200, None, None))
    store.settle(hanging, Outcome("pending", None, "no answer within 15 s", 220.0))
    (found,), _ = store.deliveries(created.id, 10, None)
    assert (found.status, found.last_error, found.next_attempt_at) == ("delivered", None, None)
    store.close()


@pytest.mark.parametrize("outcome", [Outcome("pending", None, "hung", 9000.0), Outcome("failed", None, "hung", None)])
def test_what_is_to_be_sent_again_is_not_put_off_by_the_attempt_before(tmp_path: Path, outcome: Outcome) -> None:
    """It hung while there was no room for another."""
    store, created = with_a_notice(tmp_path)
    (hanging,), _ = store.claim(200.0, {}, 1, lambda _: 10.0)
    store.redeliver(created.id, "evt_1", 201.0)
    assert store.claim(202.0, {created.id: 1}, 1, lambda _: 10.0) == ([], None)
    store.settle(hanging, outcome)
    (again,), _ = store.claim(203.0, {}, 1, lambda _: 10.0)
    assert again.notice == hanging.notice
    store.close()


def test_an_old_secret_is_good_for_a_day(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    store.rotate(created.id, "whsec_2", 200.0, 300.0)
    assert store.secrets(created.id, 299.0) == ("whsec_2", "whsec_1")
    assert store.secrets(created.id, 300.0) == ("whsec_2",)
    store.close()


def test_a_rotation_that_is_repeated_keeps_the_secret_that_the_receiver_has(tmp_path: Path) -> None:
    """The answer to the first one was lost, so nobody knows what it made."""
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    store.rotate(created.id, "whsec_2", 200.0, 300.0)
    store.rotate(created.id, "whsec_3", 210.0, 310.0)
    assert store.secrets(created.id, 299.0) == ("whsec_3", "whsec_2", "whsec_1")
    assert store.secrets(created.id, 300.0) == ("whsec_3", "whsec_2")
    assert store.secrets(created.id, 310.0) == ("whsec_3",)
    store.close()


def test_a_rotation_that_keeps_nothing_ends_every_old_secret(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    store.rotate(created.id, "whsec_2", 200.0, 300.0)
    store.rotate(created.id, "whsec_3", 210.0, None)
    assert store.secrets(created.id, 211.0) == ("whsec_3",)
    store.close()


def test_there_is_a_limit_of_valid_old_secrets(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_0", "", "http://8.8.8.8/", TYPES, 100.0)
    for number in range(1, MOST_OLD_SECRETS + 1):
        store.rotate(created.id, f"whsec_{number}", 200.0, 300.0)
    before = store.secrets(created.id, 299.0)
    with pytest.raises(UserError, match="10 old secrets"):
        store.rotate(created.id, "whsec_more", 299.0, 399.0)
    assert store.secrets(created.id, 299.0) == before
    store.rotate(created.id, "whsec_more", 300.0, 400.0)
    assert store.secrets(created.id, 300.0) == ("whsec_more", before[0])
    store.close()


def test_a_file_of_the_first_version_keeps_its_old_secret(tmp_path: Path) -> None:
    """Of the first version."""
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_2", "", "http://8.8.8.8/", TYPES, 100.0)
    store.close()
    with closing(sqlite3.connect(tmp_path / "webhooks.db", isolation_level=None)) as earlier:
        earlier.execute("DROP TABLE old_secrets")
        earlier.execute("UPDATE endpoints SET old_secret = 'whsec_1', old_secret_until = 300.0")
    for _ in range(2):
        store = WebhookStore(tmp_path / "webhooks.db")
        assert store.secrets(created.id, 299.0) == ("whsec_2", "whsec_1")
        assert store.secrets(created.id, 300.0) == ("whsec_2",)
        store.close()


def test_there_is_a_limit_of_endpoints(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    for number in range(MOST_ENDPOINTS):
        store.create(f"we_{number}", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    with pytest.raises(UserError, match="delete one first"):
        store.create("one more", "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0)
    store.close()


def test_deliveries_that_are_over_are_deleted_after_a_month_and_pending_ones_are_kept(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    created = store.create("we_1", "whsec_1", "", "http://8.8.8.8/", TYPES, 0.0)
    times = {"evt_old": 100.0, "evt_pending": 100.0, "evt_young": 200.0}
    store.note([Notice(name, "fine_tuning.job.failed", "j", at) for name, at in times.items()], Cursor(1, "e"), 300.0)
    webhooks = Webhooks.__new__(Webhooks)
    webhooks._pace = Pace()
    for attempt in store.claim(300.0, {}, 8, lambda _: 10.0)[0]:
        if attempt.notice.event_id != "evt_pending":
            store.settle(attempt, webhooks._outcome(attempt, 200, None))
    store.prune(150.0)
    found, _ = store.deliveries(created.id, 10, None)
    assert [one.notice.event_id for one in found] == ["evt_young", "evt_pending"]
    store.close()


def test_a_page_goes_on_after_a_deleted_endpoint_for_as_long_as_deliveries_are_kept(tmp_path: Path) -> None:
    store = WebhookStore(tmp_path / "webhooks.db")
    first, second = (store.create(name, "whsec_1", "", "http://8.8.8.8/", TYPES, 100.0) for name in ("we_1", "we_2"))
    for at in (150.0, 160.0):  # deleted, created again with the same Idempotency-Key, deleted again
        store.delete(second.id, at)
        assert store.endpoints(10, second.id) == ([first], False)
        store.create(second.id, "whsec_1", "", "http://8.8.8.8/", TYPES, at)
    third = store.create("we_3", "whsec_1", "", "http://8.8.8.8/", TYPES, 170.0)
    store.delete(third.id, 180.0)
    assert [one.id for one in store.endpoints(10, third.id)[0]] == [second.id, first.id]
    store.prune(180.0)
    assert [one.id for one in store.endpoints(10, third.id)[0]] == [second.id, first.id]
    store.prune(180.5)
    with pytest.raises(UserError, match="no 'we_3' in this list"):
        store.endpoints(10, third.id)
    store.close()
