"""Who may start now, and why the others wait. A policy: it decides and touches nothing.

Jobs are admitted strictly in the order they were submitted. A job that fits the free resources starts; the head of the
line is admitted also where it doesn't, so that its placement group, pending inside Ray, makes an autoscaler add nodes.
Nobody behind one that doesn't fit is admitted: a small job never delays a big one that came first. What a job will take
whose runner is being replaced is set aside for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from events.facts import Resources


@dataclass(frozen=True)
class Node:
    """What one node has (or has free). Quantities are Ray's logical resources; `memory` in bytes, 0: not known."""

    cpus: float
    gpus: float
    memory: float = 0


@dataclass(frozen=True)
class NodeGroup:
    """A kind of node an autoscaler may add, up to `max_count` of them."""

    node: Node
    max_count: int


@dataclass(frozen=True)
class Capacity:
    """The cluster as it is and as it could become."""

    nodes: tuple[Node, ...]
    free: tuple[Node, ...]
    groups: tuple[NodeGroup, ...] = ()

    @property
    def has_gpus(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes) or any(
            group.node.gpus >= 1 and group.max_count > 0 for group in self.groups
        )

    def largest(self) -> tuple[Node, ...]:
        """Every node there could ever be. A group counts as many nodes as one job could use."""
        return self.nodes + tuple(group.node for group in self.groups for _ in range(min(group.max_count, 1024)))


@dataclass(frozen=True)
class Waiting:
    """A validated job that has not started. `admitted` jobs may ask Ray for resources; `placed` ones hold them. One
    that isn't `ready` has no runner at the moment: it can't be admitted, but it keeps its place in the line."""

    job_id: str
    resources: Resources
    admitted: bool = False
    placed: bool = False
    ready: bool = True


@dataclass(frozen=True)
class Decision:
    """Jobs to admit now, in order, and for each job that is ready and waits, why."""

    admit: tuple[str, ...]
    whys: dict[str, str]


def place(resources: Resources, nodes: Sequence[Node]) -> tuple[Node, ...] | None:
    """What is left of `nodes` once the job's workers are on them; None if they don't fit.

    A job takes its workers in equal shares on exactly `resources.nodes` nodes, as torchrun's --nnodes means it. The
    fullest nodes that still fit are taken first, which keeps room for bigger jobs.
    """
    share = -(-resources.workers // resources.nodes)
    cpus, gpus = share * resources.cpus_per_worker, share * resources.gpus_per_worker
    order = sorted(range(len(nodes)), key=lambda i: (nodes[i].gpus, nodes[i].cpus))
    chosen = [i for i in order if nodes[i].cpus >= cpus and nodes[i].gpus >= gpus][: resources.nodes]
    if len(chosen) < resources.nodes:
        return None
    left = list(nodes)
    for i in chosen:
        left[i] = replace(nodes[i], cpus=nodes[i].cpus - cpus, gpus=nodes[i].gpus - gpus)
    return tuple(left)


def infeasible(resources: Resources, capacity: Capacity) -> str | None:
    """Why no state of this cluster could ever hold the job; None when one could."""
    if place(resources, capacity.largest()) is not None:
        return None
    biggest = max(capacity.largest(), key=lambda node: (node.gpus, node.cpus), default=Node(0, 0))
    return (
        f"the job needs {describe(resources)}, and this cluster can never hold it: it has, or can grow to, "
        f"{_amount(len(capacity.largest()), 'node')}, the largest with {_amount(biggest.cpus, 'CPU')} and "
        f"{_amount(biggest.gpus, 'GPU')}; ask for fewer workers with --nproc_per_node or --nnodes"
    )


def worker_memory(resources: Resources, capacity: Capacity) -> int | None:
    """Bytes that each worker of a job on CPUs may take on the roomiest node that could hold it; None: nobody knows."""
    share = -(-resources.workers // resources.nodes)
    nodes = [node for node in capacity.largest() if node.cpus >= share * resources.cpus_per_worker]
    if resources.gpus_per_worker or not nodes or not all(node.memory for node in nodes):
        return None
    return int(max(node.memory for node in nodes) / share)


def memory_share(resources: Resources, capacity: Capacity) -> int | None:
    """Bytes that each worker of a job on CPUs can count on while other jobs fill its node up: as large a part of the
    memory as of the CPUs, of the node that could hold it and has least for each. None: nobody knows."""
    share = -(-resources.workers // resources.nodes)
    nodes = [node for node in capacity.largest() if node.cpus >= share * resources.cpus_per_worker]
    if resources.gpus_per_worker or not nodes:
        return None
    return int(min(node.memory / node.cpus for node in nodes) * resources.cpus_per_worker) or None


def decide(waiting: Iterable[Waiting], free: Sequence[Node]) -> Decision:
    """Which of the `waiting` jobs (in the order they were submitted) to admit, given what is free now."""
    left = tuple(free)
    admit: list[str] = []
    whys: dict[str, str] = {}
    head, blocked = True, False
    ahead = 0
    for job in waiting:
        if job.ready and job.placed:
            whys[job.job_id] = "its resources are reserved; its workers are starting"
            continue
        rest = None if blocked else place(job.resources, left)
        blocked = rest is None
        left = left if rest is None else rest
        if job.ready:
            if not job.admitted and (head or rest is not None):
                admit.append(job.job_id)
            free_for_it = "its resources are free and are being reserved"
            whys[job.job_id] = free_for_it if rest is not None else _why(job.resources, left, ahead)
        # Behind a job that has no placement group yet, nobody may have one pending: Ray might serve that one first.
        head = False
        ahead += blocked or not job.ready
    return Decision(tuple(admit), whys)


def describe(resources: Resources) -> str:
    """`2 workers of 1 GPU and 4 CPUs on one node`, for people."""
    per_worker = _amount(resources.cpus_per_worker, "CPU")
    if resources.gpus_per_worker:
        per_worker = f"{_amount(resources.gpus_per_worker, 'GPU')} and {per_worker}"
    workers = "1 worker" if resources.workers == 1 else f"{resources.workers} workers"
    spread = "" if resources.workers == 1 else f" on {_amount(resources.nodes, 'node')}"
    return f"{workers} of {per_worker}{spread}"


def for_workers(nodes: int, per_node: int, cpus_per_worker: float, gpus_per_worker: float) -> Resources:
    """The resources of `nodes` x `per_node` workers."""
    return Resources(
        workers=nodes * per_node, nodes=nodes, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker
    )


def _why(resources: Resources, left: Sequence[Node], ahead: int) -> str:
    kind, per_worker = (
        ("GPU", resources.gpus_per_worker) if resources.gpus_per_worker else ("CPU", resources.cpus_per_worker)
    )
    free = sum(node.gpus if kind == "GPU" else node.cpus for node in left)
    needs = f"needs {_amount(per_worker * resources.workers, kind)}, {free:g} free"
    if resources.nodes == 1 and resources.workers > 1 and free >= per_worker * resources.workers:
        needs += " but not on one node"
    return needs if ahead == 0 else f"{needs}; {_amount(ahead, 'job')} ahead"


def _amount(quantity: float, unit: str) -> str:
    return f"{quantity:g} {unit}" if quantity == 1 else f"{quantity:g} {unit}s"
