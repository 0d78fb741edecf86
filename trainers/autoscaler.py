"""What the cluster's autoscaler may add: the node types of the file it was started with.

Ray has a place for that in its control plane, which its own autoscaler leaves empty (Ray 2.60, both versions of it). It
runs beside the dispatcher, on the head, and is told the file on its command line; Ray's launcher puts it into
~/ray_bootstrap_config.yaml. An autoscaler that runs elsewhere (KubeRay's) isn't found.
"""

import logging
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from trainers.admission import Node, NodeGroup

logger = logging.getLogger("tunewright.autoscaler")


class Autoscaler:
    """That of the cluster whose control plane listens on `gcs_address`, "host:port", of this machine. All methods
    block on files."""

    def __init__(self, gcs_address: str) -> None:
        self._port = gcs_address.rpartition(":")[2]
        self._read: tuple[float, tuple[NodeGroup, ...]] = (0.0, ())  # when the file was changed, what it says

    def groups(self) -> tuple[NodeGroup, ...]:
        """As the file says now: the autoscaler follows its changes as well. None without a file."""
        if self._file is None:
            return ()
        try:
            changed = self._file.stat().st_mtime
            if changed != self._read[0]:
                self._read = (changed, node_groups(yaml.safe_load(self._file.read_text(encoding="utf-8"))))
        except (OSError, yaml.YAMLError) as error:
            logger.warning("what the autoscaler may add is not known, as its file can't be read: %s", error)
        return self._read[1]

    @cached_property
    def _file(self) -> Path | None:
        for process in psutil.process_iter(["cmdline"]):
            options = dict(
                part.split("=", 1) for part in process.info["cmdline"] or () if part.startswith("--") and "=" in part
            )
            here = options.get("--gcs-address", "").rpartition(":")[2] == self._port
            if here and "--autoscaling-config" in options:
                return Path(options["--autoscaling-config"]).expanduser()
        return None


def node_groups(config: Mapping[str, Any]) -> tuple[NodeGroup, ...]:
    """Of a cluster's config, as Ray's launcher takes it."""
    most = config.get("max_workers", sys.maxsize)
    return tuple(
        NodeGroup(node_of(kind.get("resources") or {}), min(most, kind.get("max_workers", most)))
        for kind in (config.get("available_node_types") or {}).values()
    )


def node_of(resources: Mapping[str, Any]) -> Node:
    """Ray's two kinds of memory are together what was available when the node started."""
    memory = resources.get("memory", 0.0)
    return Node(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory=memory + resources.get("object_store_memory", 0.0) if memory else 0.0,
    )
