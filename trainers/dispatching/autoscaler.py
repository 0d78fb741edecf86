"""Reads which nodes the cluster's autoscaler may add, from the cluster config that it was started with.

Ray's control plane has a field for that, but neither version of Ray's autoscaler fills it (Ray 2.60). The autoscaler
runs on the head node, as the dispatcher does, and has the config's path on its command line (Ray's launcher writes
~/ray_bootstrap_config.yaml). An autoscaler that runs elsewhere (KubeRay's) isn't found.
"""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import BaseModel

from trainers.dispatching.admission import Node, NodeGroup

logger = logging.getLogger("tunewright.autoscaler")


SEEK_S = 60.0
"""Seconds between two searches of this machine's processes for an autoscaler, until one is found."""


class Autoscaler:
    """The autoscaler of the cluster whose control plane (GCS) listens on this machine at `gcs_address`, "host:port".
    All methods block on files."""

    def __init__(self, gcs_address: str) -> None:
        self._port = gcs_address.rpartition(":")[2]
        self._found: Path | None = None
        self._sought = float("-inf")
        self._groups: tuple[NodeGroup, ...] = ()
        self._read_at = 0.0  # the file's modification time
        self._complaint = ""

    def groups(self) -> tuple[NodeGroup, ...]:
        """The node types in the config as it is now: the autoscaler follows changes of the file, too. Empty without an
        autoscaler. While the file can't be read or is invalid (it may be half written), its last valid content counts,
        and a warning is logged once."""
        file = self._file()
        if file is None:
            return ()
        try:
            changed = file.stat().st_mtime
            if changed != self._read_at:
                self._groups = node_groups(yaml.safe_load(file.read_text(encoding="utf-8")))
                self._read_at = changed
            self._complaint = ""
        except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError: not UTF-8, or not a _ClusterConfig
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.warning("%s can't be read, so what the autoscaler may add is assumed unchanged: %s", file, error)
        return self._groups

    def _file(self) -> Path | None:
        if self._found is None and time.monotonic() - self._sought > SEEK_S:
            self._found = _file_of(self._port)
            self._sought = time.monotonic()
        return self._found


def _file_of(port: str) -> Path | None:
    for process in psutil.process_iter(["cmdline"]):
        options = dict(
            part.split("=", 1) for part in process.info["cmdline"] or () if part.startswith("--") and "=" in part
        )
        if options.get("--gcs-address", "").rpartition(":")[2] == port and "--autoscaling-config" in options:
            return Path(options["--autoscaling-config"]).expanduser()
    return None


class _NodeType(BaseModel):
    resources: dict[str, float] | None = None
    max_workers: int | None = None


class _ClusterConfig(BaseModel):
    """The part of Ray's cluster config that is read here. Null counts as not set."""

    max_workers: int | None = None
    head_node_type: str | None = None
    available_node_types: dict[str, _NodeType | None] | None = None


def node_groups(config: object) -> tuple[NodeGroup, ...]:
    """The node types of a cluster config, as Ray's launcher takes it. No further nodes of the head's type are added,
    unless its `max_workers` says otherwise. Raises ValueError if `config` is not a cluster config."""
    cluster = _ClusterConfig.model_validate(config)
    most = sys.maxsize if cluster.max_workers is None else cluster.max_workers
    groups = []
    for name, given in (cluster.available_node_types or {}).items():
        kind = given or _NodeType()
        unsaid = 0 if name == cluster.head_node_type else most
        count = unsaid if kind.max_workers is None else min(most, kind.max_workers)
        groups.append(NodeGroup(node_of(kind.resources or {}), count))
    return tuple(groups)


def node_of(resources: Mapping[str, Any]) -> Node:
    """A node with these Ray resources. Its memory is that for tasks plus that for objects: together, what was available
    when the node started."""
    memory = resources.get("memory", 0.0)
    return Node(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory=memory + resources.get("object_store_memory", 0.0) if memory else 0.0,
    )
