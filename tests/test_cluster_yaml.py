"""cluster.yaml: Ray's launcher accepts it, it scales from zero and back, and it starts the service of `make serve`."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from jsonschema.validators import validator_for
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.local import ray_env

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


def test_it_fits_ray_s_own_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert list(validator_for(schema)(schema).iter_errors(cluster)) == []


def test_the_launcher_accepts_it_with_its_defaults_filled_in(cluster: dict[str, Any]) -> None:
    filled = prepare_config(cluster)
    assert filled.keys() > cluster.keys()
    validate_config(filled)  # raises an error if something is wrong


def test_gpu_nodes_scale_from_zero_and_back(cluster: dict[str, Any]) -> None:
    gpu_types = {k: t for k, t in cluster["available_node_types"].items() if t["resources"].get("GPU")}
    assert gpu_types
    for name, node_type in gpu_types.items():
        assert node_type["min_workers"] == 0, name
        assert node_type["max_workers"] > 0, name
        assert node_type["resources"]["CPU"] >= node_type["resources"]["GPU"], name
        assert "ray.io/accelerator-type" in node_type["labels"], name
    assert cluster["max_workers"] > 0
    assert cluster["idle_timeout_minutes"] > 0


def test_the_head_is_one_node_without_gpus(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["max_workers"] == 0
    assert "GPU" not in head["resources"]


def test_every_variable_is_set_in_one_place(cluster: dict[str, Any]) -> None:
    """In ray.env, or in one block of cluster.yaml if it differs on a cluster. No start command sets any."""
    setup = "\n".join(cluster["setup_commands"])
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert "cat ~/tunewright/serve_app/ray.env - > ~/cluster.env" in setup
    for command in starts:
        assert not re.search(r"\b(RAY|TUNEWRIGHT)_[A-Za-z_]+=", command), command
        if "ray start" in command or "serve deploy" in command:
            assert command.startswith("set -a && . ~/cluster.env && set +a"), command
    own = dict(re.findall(r"^([A-Z][A-Z_]+)=(.*)$", setup, re.MULTILINE))
    assert own["RAY_AUTH_MODE"] == "token"
    repeated = {name for name, value in own.items() if ray_env().get(name) == value}
    assert not repeated, f"{repeated} already stand in ray.env"


def test_the_file_of_variables_is_whole_and_takes_the_secrets_that_are_there_when_ray_starts(
    cluster: dict[str, Any], tmp_path: Path
) -> None:
    """Runs the block with a home directory of its own."""
    (block,) = (command for command in cluster["setup_commands"] if "> ~/cluster.env" in command)
    (tmp_path / "tunewright").symlink_to(ROOT)
    secrets = tmp_path / "secrets.env"
    block = block.replace("/mnt/tunewright/secrets.env", str(secrets))
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def run(command: str) -> list[str]:
        bash = ["/bin/bash", "-euc", command]
        return subprocess.run(bash, env=environment, capture_output=True, text=True, check=True).stdout.split()

    start = 'set -a && . ~/cluster.env && set +a && env | grep -E "^(RAY_AUTH_MODE|RAY_SERVE_HAPROXY_B|HF_TOKEN)"'
    run(block)
    haproxy = f"RAY_SERVE_HAPROXY_BINARY_PATH={tmp_path}/tunewright/serve_app/haproxy-on-loopback"
    assert set(run(start)) == {"RAY_AUTH_MODE=token", haproxy}
    for token in ("hf_secret", "hf_another"):
        secrets.write_text(f"HF_TOKEN={token}\n")
        assert set(run(start)) == {"RAY_AUTH_MODE=token", haproxy, f"HF_TOKEN={token}"}
    assert "hf_" not in (tmp_path / "cluster.env").read_text()


def test_workers_compute_on_the_cpus_they_hold(cluster: dict[str, Any], tmp_path: Path) -> None:
    """Ray's launcher runs commands with OMP_NUM_THREADS=1, which the workers of a `ray start` would inherit."""
    (tmp_path / "tunewright").symlink_to(ROOT)
    (tmp_path / ".bashrc").touch()
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    with_interactive: Callable[[str], list[str]] = _with_interactive

    def launched(command: str) -> str:
        bash = ["/bin/bash", "-c", " ".join(with_interactive(command))]
        return subprocess.run(bash, env=environment, capture_output=True, text=True, check=True).stdout

    assert "OMP_NUM_THREADS=1" in launched("env")
    launched(next(command for command in cluster["setup_commands"] if "> ~/cluster.env" in command))
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        if "ray start" in command:
            variables = launched(command.partition(" && ulimit")[0] + " && env")
            assert "RAY_AUTH_MODE=token" in variables
            assert "OMP_NUM_THREADS" not in variables


def test_a_shell_on_a_node_has_what_ray_was_started_with(cluster: dict[str, Any], tmp_path: Path) -> None:
    """A shell that isn't interactive, too, for which .bashrc may return in its first line."""
    bashrc = tmp_path / ".bashrc"
    bashrc.write_text("return\n")
    lines = [command for command in cluster["setup_commands"] if "~/.bashrc" in command]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def run(command: str) -> str:
        bash = ["/bin/bash", "-euc", command]
        return subprocess.run(bash, env=environment, capture_output=True, text=True, check=True).stdout

    for _ in range(2):  # as each `ray up` does
        for line in lines:
            run(line)
    assert len(bashrc.read_text().splitlines()) == 3
    assert run(". ~/.bashrc; echo ${RAY_AUTH_MODE-unset}") == "unset\n"
    (tmp_path / "cluster.env").write_text("RAY_AUTH_MODE=token\n")
    assert run(". ~/.bashrc; env").count("RAY_AUTH_MODE=token") == 1
    assert f"{tmp_path}/venv/bin:" in run(". ~/.bashrc; echo $PATH")


def test_storage_is_the_shared_mount(cluster: dict[str, Any]) -> None:
    storage = re.search(r"TUNEWRIGHT_STORAGE=(\S+)", "\n".join(cluster["setup_commands"]))
    assert storage
    assert any(c.startswith("mountpoint") and c.endswith(storage[1]) for c in cluster["initialization_commands"])


def test_the_dashboard_listens_on_loopback_and_the_token_is_distributed(cluster: dict[str, Any]) -> None:
    start = next(c for c in cluster["head_start_ray_commands"] if "ray start" in c)
    assert "--dashboard-host=127.0.0.1" in start
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_it_starts_the_service_that_make_serve_starts(cluster: dict[str, Any]) -> None:
    deploy = cluster["head_start_ray_commands"][-1]
    assert deploy.endswith("serve deploy serve_app/serve.yaml")
    assert (ROOT / "serve_app" / "serve.yaml").exists()
