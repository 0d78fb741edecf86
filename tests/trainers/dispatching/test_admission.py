"""The order in which jobs start, and what the others are told."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.facts import Resources
from trainers.dispatching.admission import (
    Capacity,
    Node,
    NodeGroup,
    Waiting,
    decide,
    for_workers,
    infeasible,
    memory_share,
    place,
    worker_memory,
)
from trainers.planning.overrides import MAX_NODES


def cpus(workers: int, nodes: int = 1) -> Resources:
    return for_workers(nodes, workers // nodes, cpus_per_worker=1, gpus_per_worker=0)


def gpus(workers: int, nodes: int = 1) -> Resources:
    return for_workers(nodes, workers // nodes, cpus_per_worker=1, gpus_per_worker=1)


def test_jobs_that_fit_together_start_together() -> None:
    decision = decide([Waiting("a", cpus(1)), Waiting("b", cpus(3))], [Node(4, 0)])
    assert decision.admit == ("a", "b")


def test_only_the_head_of_the_line_waits_inside_ray() -> None:
    decision = decide([Waiting("a", cpus(4)), Waiting("b", cpus(4)), Waiting("c", cpus(4))], [Node(2, 0)])
    assert decision.admit == ("a",)


def test_a_small_job_does_not_overtake_a_big_one() -> None:
    decision = decide([Waiting("big", cpus(4)), Waiting("small", cpus(1))], [Node(2, 0)])
    assert "small" not in decision.admit
    assert decision.whys["small"] == "needs 1 CPU, 2 free; 1 job ahead"


def test_an_admitted_job_that_still_waits_keeps_the_others_behind_it() -> None:
    decision = decide([Waiting("big", cpus(4), admitted=True), Waiting("small", cpus(1))], [Node(2, 0)])
    assert decision.admit == ()
    assert decision.whys["big"] == "needs 4 CPUs, 2 free"


def test_a_placed_job_is_not_counted_twice() -> None:
    placed = Waiting("a", cpus(2), admitted=True, placed=True)
    assert decide([placed, Waiting("b", cpus(2))], [Node(2, 0)]).admit == ("b",)


def test_an_admitted_job_without_its_group_yet_keeps_what_it_will_take() -> None:
    """Also in Ray, where a group that somebody else has pending might be served first."""
    decision = decide([Waiting("a", cpus(2), admitted=True), Waiting("b", cpus(2))], [Node(3, 0)])
    assert decision.admit == ()
    assert decision.whys["b"] == "needs 2 CPUs, 1 free"


def test_what_a_job_needs_whose_runner_is_not_there_is_set_aside_for_it() -> None:
    lost = Waiting("lost", cpus(2), ready=False)
    decision = decide([lost, Waiting("big", cpus(2)), Waiting("small", cpus(1))], [Node(2, 0)])
    assert decision.admit == ()
    assert decision.whys == {"big": "needs 2 CPUs, 0 free; 1 job ahead", "small": "needs 1 CPU, 0 free; 2 jobs ahead"}
    assert decide([lost, Waiting("small", cpus(1))], [Node(3, 0)]).admit == ("small",)


def test_behind_a_job_that_does_not_fit_and_has_no_runner_nobody_starts() -> None:
    assert decide([Waiting("lost", cpus(4), ready=False), Waiting("small", cpus(1))], [Node(2, 0)]).admit == ()


def test_free_gpus_on_different_nodes_are_not_one_node() -> None:
    decision = decide([Waiting("a", gpus(2))], [Node(8, 1), Node(8, 1)])
    assert decision.whys["a"] == "needs 2 GPUs, 2 free but not on one node"


def test_workers_on_two_nodes_take_equal_shares_of_two_nodes() -> None:
    assert place(gpus(4, nodes=2), [Node(8, 2), Node(8, 4)]) == (Node(6, 0), Node(6, 2))
    assert place(gpus(4, nodes=2), [Node(8, 4), Node(8, 1)]) is None


def test_a_job_no_node_can_hold_is_infeasible_and_says_what_there_is() -> None:
    capacity = Capacity(nodes=(Node(2, 0),), free=(Node(2, 0),))
    reason = infeasible(cpus(3), capacity)
    assert reason is not None
    assert "3 workers of 1 CPU on 1 node" in reason
    assert "2 CPUs" in reason


def test_what_an_autoscaler_may_add_makes_a_job_feasible() -> None:
    capacity = Capacity(nodes=(Node(2, 0),), free=(Node(2, 0),), groups=(NodeGroup(Node(32, 8), max_count=2),))
    assert infeasible(gpus(16, nodes=2), capacity) is None
    assert infeasible(gpus(24, nodes=3), capacity) is not None
    assert capacity.has_gpus


def test_a_group_counts_for_as_many_nodes_as_a_job_may_ask_for() -> None:
    capacity = Capacity(nodes=(), free=(), groups=(NodeGroup(Node(1, 0), max_count=sys.maxsize),))
    assert infeasible(cpus(MAX_NODES, nodes=MAX_NODES), capacity) is None


def test_a_worker_counts_on_as_much_of_its_node_s_memory_as_of_its_cpus() -> None:
    roomy, small = Node(4, 0, memory=16e9), Node(2, 0, memory=4e9)
    capacity = Capacity(nodes=(roomy, small), free=())
    assert memory_share(cpus(1), capacity) == 2e9  # it may come to lie on either
    assert memory_share(cpus(3), capacity) == 4e9
    assert memory_share(cpus(8), capacity) is None
    assert memory_share(gpus(1), capacity) is None
    assert memory_share(cpus(1), Capacity(nodes=(roomy, Node(4, 0)), free=())) is None  # one that doesn't say


def test_a_worker_may_take_its_share_of_the_roomiest_node_that_could_hold_the_job() -> None:
    roomy, small = Node(4, 0, memory=8e9), Node(2, 0, memory=4e9)
    capacity = Capacity(nodes=(roomy, small), free=())
    assert worker_memory(cpus(1), capacity) == 8e9
    assert worker_memory(cpus(4), capacity) == 2e9
    assert worker_memory(cpus(4, nodes=2), capacity) == 4e9
    assert worker_memory(cpus(8), capacity) is None
    assert worker_memory(gpus(1), capacity) is None
    assert worker_memory(cpus(1), Capacity(nodes=(roomy, Node(4, 0)), free=())) is None  # one that doesn't say


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=8),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_whatever_the_line_admission_is_a_prefix_of_it_and_leaves_the_older_what_they_need(
    jobs: list[tuple[int, bool]], free: list[int]
) -> None:
    line = [Waiting(str(i), cpus(size), ready=ready) for i, (size, ready) in enumerate(jobs)]
    nodes: tuple[Node, ...] | None = tuple(Node(n, 0) for n in free)
    decision = decide(line, [Node(n, 0) for n in free])
    ready = [job.job_id for job in line if job.ready]
    assert list(decision.admit) == ready[: len(decision.admit)]
    assert list(decision.whys) == ready
    last = int(decision.admit[-1]) if decision.admit else 0
    for job in line[: last + 1] if last else []:  # the head alone may be too big
        assert nodes is not None
        nodes = place(job.resources, nodes)
        assert nodes is not None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_placing_takes_exactly_what_the_job_needs(size: int) -> None:
    left = place(cpus(size), [Node(4, 0), Node(3, 0)])
    assert left is not None
    assert sum(node.cpus for node in left) == 7 - size
