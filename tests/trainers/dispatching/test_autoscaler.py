"""The nodes that Ray's autoscaler may add are known before it has added any: on a cluster that starts without a GPU,
jobs ask for GPUs all the same, and get them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.conftest import ray_head
from tests.ports import free_ports
from trainers.dispatching.admission import Node, NodeGroup
from trainers.dispatching.autoscaler import Autoscaler, node_groups

ROOT = Path(__file__).parents[3]
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

HEAD = "ray.head.default"  # the provider uses this name, whatever the config says
_LISTS = (
    "cluster_synced_files",
    "head_setup_commands",
    "head_start_ray_commands",
    "initialization_commands",
    "rsync_exclude",
    "rsync_filter",
    "setup_commands",
    "worker_setup_commands",
    "worker_start_ray_commands",
)
"""Keys that Ray's launcher fills in and its autoscaler requires."""

DRIVER = """
import json, sys
import ray
from ray.util.placement_group import placement_group
from trainers.dispatching.cluster import Cluster

ray.init(sys.argv[1], log_to_driver=False)
capacity = Cluster().capacity()
assert placement_group([{"GPU": 1}]).wait(120), "no node came"
print(json.dumps([len(capacity.nodes), capacity.has_gpus, capacity.largest()[-1].gpus]))
"""


def config(**provider: Any) -> dict[str, Any]:
    return {
        "cluster_name": "test",
        "max_workers": 3,
        "provider": {"type": "external", "module": PROVIDER, "launch_multiple": True} | provider,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpus": {
                "resources": {"CPU": 1, "GPU": 2, "object_store_memory": 100 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "idle_timeout_minutes": 1,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    } | {key: [] for key in _LISTS}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster whose autoscaler starts more nodes on this machine, and the environment to reach it."""
    gcs, dashboard = free_ports(2)
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config(gcs_address=f"127.0.0.1:{gcs}", head_node_id=FAKE_HEAD_NODE_ID)))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with ray_head(gcs, (f"--dashboard-port={dashboard}", f"--autoscaling-config={file}", "--num-cpus=1"), env):
        yield f"127.0.0.1:{gcs}", env


def test_a_cluster_that_begins_without_a_gpu_has_those_of_its_autoscaler(head: tuple[str, dict[str, str]]) -> None:
    address, env = head
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, address], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    assert json.loads(driver.stdout.splitlines()[-1]) == [1, True, 2]


def test_the_cluster_config_says_how_many_nodes_of_which_type_may_be_added() -> None:
    assert node_groups(config()) == (NodeGroup(Node(1, 0), 0), NodeGroup(Node(1, 2), 2))
    shipped = node_groups(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    assert NodeGroup(Node(192, 8), 2) in shipped
    unlimited: dict[str, Any] = {"available_node_types": {"cpu": {"resources": {"CPU": 4}}}}
    assert node_groups(unlimited)[0].max_count == sys.maxsize
    assert node_groups(unlimited | {"max_workers": 5})[0].max_count == 5
    assert node_groups({}) == ()


def test_no_second_head_is_expected_unless_the_file_allows_one() -> None:
    silent: dict[str, Any] = {"head_node_type": "head", "available_node_types": {"head": {"resources": {"CPU": 4}}}}
    assert node_groups(silent) == (NodeGroup(Node(4, 0), 0),)
    silent["available_node_types"]["head"]["max_workers"] = 1
    assert node_groups(silent) == (NodeGroup(Node(4, 0), 1),)


@contextmanager
def monitor(address: str, file: Path) -> Iterator[None]:
    """A process whose command line is that of an autoscaler, with this cluster's address and this file."""
    code = "import sys; sys.stdin.read()"
    command = [sys.executable, "-c", code, f"--gcs-address={address}", f"--autoscaling-config={file}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with process.stdin:
            yield


def test_the_file_of_another_cluster_s_autoscaler_is_not_taken_and_changes_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config()))
    with monitor("10.0.0.1:7001", file):
        assert Autoscaler("10.0.0.1:7002").groups() == ()
        autoscaler = Autoscaler("10.0.0.1:7001")
        assert autoscaler.groups() == node_groups(config())
        file.write_text(json.dumps(config() | {"max_workers": 1}))
        os.utime(file, (1, 1))
        assert autoscaler.groups()[1].max_count == 1
        file.write_text("{")
        assert autoscaler.groups()[1].max_count == 1
        file.unlink()
        assert autoscaler.groups()[1].max_count == 1


@pytest.mark.parametrize(
    "content", [b"", b"available_node_types:\n  gpus: 3\n", b"max_workers: many", b"[1]", b"max_workers: \xff"]
)
def test_an_invalid_file_leaves_its_last_content_in_force_and_is_logged_once(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config()))
    with monitor("10.0.0.1:7003", file):
        autoscaler = Autoscaler("10.0.0.1:7003")
        before = autoscaler.groups()
        for time in (1, 2):
            file.write_bytes(content)
            os.utime(file, (time, time))
            assert [autoscaler.groups() for _ in range(2)] == [before] * 2
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert str(file) in caplog.text
        file.write_text(json.dumps(config() | {"max_workers": 1}))
        assert autoscaler.groups()[1].max_count == 1


def test_null_in_the_file_counts_as_not_set() -> None:
    nulls: dict[str, Any] = {"max_workers": None, "available_node_types": {"cpu": {"resources": None}, "gpus": None}}
    assert node_groups(nulls) == (NodeGroup(Node(0, 0), sys.maxsize),) * 2
    assert node_groups({"available_node_types": None}) == ()


def test_an_autoscaler_that_starts_later_is_found_without_a_look_at_all_processes_at_each_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config()))
    autoscaler = Autoscaler("10.0.0.1:7004")
    assert autoscaler.groups() == ()
    with monitor("10.0.0.1:7004", file):
        assert autoscaler.groups() == ()  # it was looked for a moment ago
        monkeypatch.setattr("trainers.dispatching.autoscaler.SEEK_S", 0)
        assert autoscaler.groups() == node_groups(config())
