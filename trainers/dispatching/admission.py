"""The admission policy: which jobs may start now, and why the others wait. Pure functions of what they are given.

Jobs are admitted strictly in the order of their submission. A job that fits into the free resources is admitted. The
first job in line is admitted even if it does not fit: its placement group, pending in Ray, makes an autoscaler add
nodes. No job behind one that doesn't fit is admitted, so a small job never delays a big one that came first. The
resources of a job whose runner is being replaced are set aside for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from events.facts import Resources
from trainers.planning.overrides import MAX_NODES


@dataclass(frozen=True)
class Node:
    """The resources of one node, in total or free. Quantities are Ray's logical resources; `memory` is in bytes (0:
    unknown)."""

    cpus: float
    gpus: float
    memory: float = 0


@dataclass(frozen=True)
class NodeGroup:
    """A node type of which an autoscaler may add up to `max_count` nodes."""

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
        """Every node there could ever be. Of a group, at most MAX_NODES are listed: no job may ask for more."""
        return self.nodes + tuple(group.node for group in self.groups for _ in range(min(group.max_count, MAX_NODES)))


@dataclass(frozen=True)
class Waiting:
    """A validated job that has not started. An `admitted` job may ask Ray for resources; a `placed` one holds them. A
    job that isn't `ready` has no runner at the moment: it can't be admitted, but it keeps its place in the line."""

    job_id: str
    resources: Resources
    admitted: bool = False
    placed: bool = False
    ready: bool = True


@dataclass(frozen=True)
class Decision:
    """The jobs to admit now, in order, and for each job that is ready and waits, the reason."""

    admit: tuple[str, ...]
    whys: dict[str, str]


def place(resources: Resources, nodes: Sequence[Node]) -> tuple[Node, ...] | None:
    """The resources that remain on `nodes` once the job's workers are placed; None if they don't fit.

    A job's workers are spread in equal shares over exactly `resources.nodes` nodes, as torchrun's --nnodes means it.
    Of the nodes that fit, those with the least free are taken first, which keeps room for bigger jobs.
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
    """Why this cluster could never hold the job, even when empty and fully scaled up; None if it could."""
    if place(resources, capacity.largest()) is not None:
        return None
    biggest = max(capacity.largest(), key=lambda node: (node.gpus, node.cpus), default=Node(0, 0))
    return (
        f"the job needs {describe(resources)}, and this cluster can never hold it: it has, or can grow to, "
        f"{_amount(len(capacity.largest()), 'node')}, the largest with {_amount(biggest.cpus, 'CPU')} and "
        f"{_amount(biggest.gpus, 'GPU')}; ask for fewer workers with --nproc_per_node or --nnodes"
    )


def worker_memory(resources: Resources, capacity: Capacity) -> int | None:
    """Bytes that each worker of a CPU job may use on the node with most memory that could hold it; None if unknown."""
    share = -(-resources.workers // resources.nodes)
    nodes = [node for node in capacity.largest() if node.cpus >= share * resources.cpus_per_worker]
    if resources.gpus_per_worker or not nodes or not all(node.memory for node in nodes):
        return None
    return int(max(node.memory for node in nodes) / share)


def memory_share(resources: Resources, capacity: Capacity) -> int | None:
    """Bytes that each worker of a CPU job can count on while other jobs fill its node: the worker's share of the node's
    memory equals its share of the CPUs. Of the nodes that could hold the job, the one with least memory per CPU counts.
    None if unknown."""
    share = -(-resources.workers // resources.nodes)
    nodes = [node for node in capacity.largest() if node.cpus >= share * resources.cpus_per_worker]
    if resources.gpus_per_worker or not nodes:
        return None
    return int(min(node.memory / node.cpus for node in nodes) * resources.cpus_per_worker) or None


def decide(waiting: Iterable[Waiting], free: Sequence[Node]) -> Decision:
    """Which of the `waiting` jobs (in the order of their submission) to admit, given the `free` resources."""
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
        # Only the first job without a placement group may have one pending: Ray might serve a later one first.
        head = False
        ahead += blocked or not job.ready
    return Decision(tuple(admit), whys)


def describe(resources: Resources) -> str:
    """The resources in words: `2 workers of 1 GPU and 4 CPUs on 1 node`."""
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
