"""What the cluster's autoscaler may add: the node types of the file it was started with.

Ray has a place for that in its control plane, which its own autoscaler leaves empty (Ray 2.60, both versions of it). It
runs beside the dispatcher, on the head, and is told the file on its command line; Ray's launcher puts it into
~/ray_bootstrap_config.yaml. An autoscaler that runs elsewhere (KubeRay's) isn't found.
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
"""Between two looks at all processes of this machine for an autoscaler that isn't there, or not yet."""


class Autoscaler:
    """That of the cluster whose control plane listens on `gcs_address`, "host:port", of this machine. All methods
    block on files."""

    def __init__(self, gcs_address: str) -> None:
        self._port = gcs_address.rpartition(":")[2]
        self._found: Path | None = None
        self._sought = float("-inf")
        self._groups: tuple[NodeGroup, ...] = ()
        self._read_at = 0.0  # the file's time of change
        self._complaint = ""

    def groups(self) -> tuple[NodeGroup, ...]:
        """As the file says now: the autoscaler follows its changes as well. None without a file. While it can't be read
        or makes no sense (it may be half written), as it said before; that is logged once."""
        file = self._file()
        if file is None:
            return ()
        try:
            changed = file.stat().st_mtime
            if changed != self._read_at:
                self._groups = node_groups(yaml.safe_load(file.read_text(encoding="utf-8")))
                self._read_at = changed
            self._complaint = ""
        except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError: no UTF-8, or not as _ClusterConfig
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
    """What is read of Ray's cluster config. What is null is not set."""

    max_workers: int | None = None
    head_node_type: str | None = None
    available_node_types: dict[str, _NodeType | None] | None = None


def node_groups(config: object) -> tuple[NodeGroup, ...]:
    """Of a cluster's config, as Ray's launcher takes it: there is one head, unless it says otherwise. Raises ValueError
    when it is none."""
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
    """Ray's two kinds of memory are together what was available when the node started."""
    memory = resources.get("memory", 0.0)
    return Node(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory=memory + resources.get("object_store_memory", 0.0) if memory else 0.0,
    )
