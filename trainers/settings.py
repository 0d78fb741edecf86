"""The settings of the service, from environment variables `TUNEWRIGHT_<NAME>`. README.md has them as a table.

Lists are separated by ':' as in PATH. An empty variable counts as unset. Secrets (WANDB_API_KEY, HF_TOKEN, cloud
credentials) are not settings: libraries read them from the environment of the processes that need them, and they never
pass through the API.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ERROR_FILE = "error.txt"
"""Name of the file in a failed job's directory with the traceback, or other details of the failure."""

SHORTEST_IDLE_S = 15
"""Shortest `chat_idle_s`: Serve measures the load of a replica every 10 s."""

Paths = Annotated[tuple[Path, ...], NoDecode]
Names = Annotated[tuple[str, ...], NoDecode]
_HOST = re.compile(r"(?=.*[a-z])[a-z0-9._-]+")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TUNEWRIGHT_", env_ignore_empty=True, frozen=True)

    storage: Path = Field(
        default=Path("~/.tunewright"),
        description="Directory of the event log, the jobs and their checkpoints. Every node must see it at the same "
        "path: with several nodes, on a shared file system.",
    )
    data_roots: Paths = Field(
        default=(),
        description="Directories that jobs may read local data files from, besides `<storage>/data`; separated by ':'.",
    )
    model_roots: Paths = Field(
        default=(),
        description="Directories that jobs may load local models from, besides `<storage>/models`; separated by ':'.",
    )
    cpus_per_worker: float = Field(default=1, gt=0, description="CPUs that each training worker reserves.")
    use_gpu: bool | None = Field(
        default=None,
        description="Whether jobs train on GPUs. Unset: they do if the cluster has any, or can scale up to some.",
    )
    max_waiting_runners: int = Field(
        default=4,
        ge=1,
        description="Maximum number of runner processes that validate data or wait for resources at a time; further "
        "jobs wait without a process. (Up to twice as many for a while, if older jobs were interrupted.)",
    )
    max_live_jobs: int = Field(
        default=1000, ge=1, description="Maximum number of unfinished jobs; a submit beyond that gets a 429."
    )
    max_body_bytes: int = Field(
        default=1 << 20, ge=1, description="Maximum size of a JSON request body; a larger one gets a 413."
    )
    files: str | None = Field(
        default=None,
        description="Where uploaded files are kept: a directory, or the URL of an object store that fsspec can reach "
        "(`s3://bucket/prefix`). Every node must reach it. Unset: `<storage>/files`.",
    )
    max_file_bytes: int = Field(
        default=512 << 20, ge=1, description="Maximum size of a file for POST /v1/files; a larger one gets a 413."
    )
    max_upload_bytes: int = Field(
        default=8 << 30, ge=1, description="Maximum size of an upload in parts (/v1/uploads); a larger one gets a 413."
    )
    files_quota_bytes: int = Field(
        default=100 << 30,
        ge=1,
        description="Maximum size of all uploaded files together; an upload beyond that gets a 429.",
    )
    data_cache_bytes: int = Field(
        default=20 << 30,
        ge=0,
        description="Tokenised data is kept for later jobs on the same data, up to this size; the least recently used "
        "is deleted first. An unfinished job keeps what it uses.",
    )
    chat_models: int = Field(
        default=2,
        ge=1,
        description="Maximum number of models that the process behind /v1/chat/completions (the chat process) holds "
        "at a time: those asked last.",
    )
    chat_idle_s: float = Field(
        default=300,
        ge=SHORTEST_IDLE_S,
        description="Seconds without a question after which the chat process ends.",
    )
    chat_cpus: float = Field(
        default=0,
        ge=0,
        description="CPUs that the chat process reserves. 0: none; it then starts even when jobs hold every CPU, and "
        "uses one core at most, at the priority of training.",
    )
    chat_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that the chat process reserves; 0: it computes on the CPU. Unset: 1 if TUNEWRIGHT_USE_GPU is "
        "true or, where that is unset, if the cluster has GPUs, or can scale up to some, when the service is "
        "deployed; else 0.",
    )
    chat_engine: Literal["auto", "torchtune", "vllm"] = Field(
        default="auto",
        description="What computes the answers in chat: `torchtune` (its components), `vllm`, or `auto`: vLLM if it is "
        "installed and a GPU is reserved, else torchtune.",
    )
    heartbeat_s: float = Field(default=15, gt=0, description="An idle tail gets an empty line every so many seconds.")
    webhook_networks: str = Field(
        default="",
        description="Networks that webhooks may be sent to, besides the public internet; separated by ',' "
        "(`10.1.0.0/16,127.0.0.1`).",
    )
    hosts: Names = Field(
        default=(),
        description="Host names that clients reach the service by, without ports, separated by ':'. A request for any "
        "other host gets a 421, except localhost and IP addresses. Unset: every host is accepted.",
    )

    @field_validator("data_roots", "model_roots", "hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("storage", "data_roots", "model_roots")
    @classmethod
    def _absolute(cls, value: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        if isinstance(value, Path):
            return value.expanduser().resolve()
        return tuple(path.expanduser().resolve() for path in value)

    @field_validator("files")
    @classmethod
    def _absolute_unless_a_url(cls, value: str | None) -> str | None:
        return value if value is None or "://" in value else str(Path(value).expanduser().resolve())

    @field_validator("webhook_networks")
    @classmethod
    def _networks(cls, value: str) -> str:
        for network in filter(None, value.split(",")):
            ip_network(network.strip())  # raises ValueError, which says what is wrong with it
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.strip().lower() for name in value)
        if not all(map(_HOST.fullmatch, names)):
            raise ValueError("takes host names without ports, separated by ':'")
        return names

    @property
    def allowed_data_roots(self) -> tuple[Path, ...]:
        """Every directory that local data files may be in."""
        return (self.storage / "data", *self.data_roots)

    @property
    def allowed_model_roots(self) -> tuple[Path, ...]:
        """Every directory that local models may be in, those of checkpoints included."""
        return (self.model_cache, self.storage / "jobs", *self.model_roots)

    @property
    def model_cache(self) -> Path:
        """Directory of downloaded and converted models."""
        return self.storage / "models"

    @property
    def data_cache(self) -> Path:
        """Directory of tokenised data that is kept for later jobs."""
        return self.storage / "tokenised"

    @property
    def files_url(self) -> str:
        """Path or URL of the uploaded files."""
        return self.files or str(self.storage / "files")

    @property
    def allowed_webhook_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Networks that webhooks may be sent to, besides the public internet."""
        return tuple(ip_network(network.strip()) for network in filter(None, self.webhook_networks.split(",")))

    @property
    def webhooks(self) -> Path:
        """The database file of webhook endpoints and deliveries. It contains secrets."""
        return self.storage / "webhooks.db"

    def job_dir(self, job_id: str) -> Path:
        """Directory of one job: data, checkpoints, log lines, metrics."""
        return self.storage / "jobs" / job_id

    def as_env(self) -> dict[str, str]:
        """Environment variables that give another process the same settings."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            text = ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
            values[f"TUNEWRIGHT_{name.upper()}"] = "" if value is None else text
        return values


def misspelled(environment: Iterable[str]) -> list[str]:
    """A warning for each variable in `environment` that looks like a misspelled setting. (Not for all that begin with
    TUNEWRIGHT_: Kubernetes sets some with the name of a service.)"""
    known = [name.upper() for name in Settings.model_fields]
    lines = []
    for variable in sorted(environment):
        prefix, _, name = variable.upper().partition("_")
        if prefix == "TUNEWRIGHT" and name not in known and (meant := get_close_matches(name, known, 1, 0.75)):
            lines.append(f"{variable} is not a setting and has no effect: did you mean TUNEWRIGHT_{meant[0]}?")
    return lines


class InvalidSettingsError(Exception):
    """The environment has invalid settings. The message says which and why, but doesn't repeat their values."""


@cache
def settings() -> Settings:
    """The settings of this process, read once. Raises InvalidSettingsError."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = [f"TUNEWRIGHT_{problem['loc'][0]}".upper() + f": {problem['msg']}" for problem in error.errors()]
        raise InvalidSettingsError("\n".join(wrong)) from None
