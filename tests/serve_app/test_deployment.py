"""What Serve is given: the application, its config file, and Ray's settings."""

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

import serve_app
from serve_app.chat.deployment import deployment as chat_deployment
from serve_app.chat.deployment import gpus, see_reserved_gpus_only
from serve_app.deployment import MAX_ONGOING_REQUESTS, deployment
from serve_app.local import LocalService
from trainers.settings import Settings

HERE = Path(serve_app.__file__).parent
RAY_ENV = HERE / "ray.env"


def assignments() -> dict[str, str]:
    lines = [line for line in RAY_ENV.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_package_exposes_a_serve_application() -> None:
    assert isinstance(serve_app.app, Application)


def test_hundreds_of_tails_leave_room_for_short_requests() -> None:
    assert deployment.max_ongoing_requests == MAX_ONGOING_REQUESTS >= 500


def test_the_door_takes_no_cpu_from_training() -> None:
    assert deployment.ray_actor_options is not None
    assert deployment.ray_actor_options["num_cpus"] == 0


def test_nobody_who_asks_means_no_replica_for_chat_and_no_cpu_either() -> None:
    idle = Settings(chat_idle_s=60)
    chat = chat_deployment(idle, gpus(idle))
    scaling, options = chat._deployment_config.autoscaling_config, chat.ray_actor_options
    assert scaling is not None
    assert options is not None
    assert (scaling.min_replicas, scaling.look_back_period_s + scaling.downscale_delay_s) == (0, 60)
    assert options["num_cpus"] == options["num_gpus"] == 0
    reserved = chat_deployment(Settings(chat_cpus=2), 0.5).ray_actor_options
    assert reserved is not None
    assert (reserved["num_cpus"], reserved["num_gpus"]) == (2, 0.5)
    assert (gpus(Settings(use_gpu=True)), gpus(Settings(use_gpu=True, chat_gpus=0))) == (1, 0)


@pytest.mark.parametrize(("reserved", "seen"), [([], ""), ([1], "1")])
def test_chat_sees_no_gpu_of_a_training_job(reserved: list[int], seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # as Ray has it, or as the node has: Ray leaves that alone
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: reserved)
    see_reserved_gpus_only()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_the_config_file_deploys_this_application_on_loopback_and_cuts_no_tail() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((HERE / "serve.yaml").read_text()))
    assert config.applications[0].import_path == "serve_app:app"
    assert config.http_options.host == "127.0.0.1"
    assert config.http_options.request_timeout_s is None


@pytest.mark.parametrize(("said", "hosts"), [(None, "localhost"), ("tuner.example", "tuner.example"), ("", "")])
def test_on_this_machine_it_goes_by_localhost_only_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, hosts: str
) -> None:
    monkeypatch.delenv("TUNEWRIGHT_HOSTS", raising=False)
    if said is not None:
        monkeypatch.setenv("TUNEWRIGHT_HOSTS", said)
    service = LocalService(tmp_path)
    service.stop()
    assert service.env["TUNEWRIGHT_HOSTS"] == hosts


@pytest.mark.parametrize("name", assignments())
def test_every_setting_in_ray_env_is_one_that_this_ray_reads(name: str) -> None:
    """A variable that Ray has renamed would be ignored without a word."""
    package = Path(ray.__file__).parent
    pattern = re.compile(rf"\b{name}\b".encode())
    # RAY_AUTH_MODE and the like are read by the compiled part too.
    sources = [
        *package.glob("_private/**/*.py"),
        *package.glob("_common/**/*.py"),
        *package.glob("serve/_private/*.py"),
    ]
    sources += [*package.glob("train/**/constants.py"), *package.glob("dashboard/modules/job/*.py")]
    assert any(pattern.search(source.read_bytes()) for source in sources)


def test_every_setting_in_ray_env_has_its_reason_above_it() -> None:
    lines = RAY_ENV.read_text().splitlines()
    for above, line in pairwise(lines):
        if "=" in line and not line.startswith("#"):
            assert above.startswith("#"), line


def test_ray_env_can_be_sourced_by_a_shell() -> None:
    command = 'set -a; . "$1"; env'
    done = subprocess.run(
        ["/bin/sh", "-c", command, "sh", str(RAY_ENV)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.defpath},
    )
    assert assignments().items() <= dict(line.split("=", 1) for line in done.stdout.splitlines()).items()
