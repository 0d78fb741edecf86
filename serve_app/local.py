"""The whole service on this machine: a Ray head of its own, and Serve on it. For `make serve`, the demo and the tests.

A cluster doesn't need this module: cluster.yaml uses the same two files, `ray.env` and `serve.yaml`.

Everything listens on 127.0.0.1, on ports that were free at start, and keeps its files in a temporary directory. The
only other listener is the rendezvous of a job's workers (torch's TCPStore), open while the job trains. Several services
can run beside each other and beside other Ray clusters on this machine: only processes that were started here are
stopped. They are recognised by the session of the Ray head, and by RAY_TMPDIR, which all of them inherit.

    python -m serve_app.local [--port 8000] [--dashboard-port 8265]      in the foreground, until Ctrl-C
"""

import argparse
import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml
from rich.console import Console
from rich.markup import escape

from events.sqlite import LOG_FILE, lock
from events.store import StoreLockedError
from serve_app.scratch import PREFIX, delete_abandoned, lock_directory
from trainers.settings import InvalidSettingsError, misspelled, settings

HERE = Path(__file__).parent
HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0  # a kill loses nothing; this only lets Ray tidy up
OBJECT_STORE_BYTES = 256 << 20  # Serve and Train hardly use it
REPLICA_PORTS = 50
_http = httpx.Client(trust_env=False)  # loopback must not go through a proxy


class ServiceError(RuntimeError):
    """The service did not come up. The message ends with the log lines that say why."""


class CannotStartError(ServiceError):
    """A port or the storage directory can't be used; nothing was started."""


class LocalService:
    """A running service: `with LocalService(storage=path) as service: httpx.get(service.url + "/healthz")`.

    `env` is added to the environment of every process of the service. `num_cpus` None: as many as the machine has. The
    attribute `env` is the whole environment: `ray` and `serve` commands that run in it reach this service, and end with
    it. Port 0: any free port. Whichever way this service ended, another LocalService on the same storage goes on where
    it stopped.
    """

    def __init__(
        self,
        storage: Path,
        *,
        num_cpus: int | None = None,
        env: Mapping[str, str] | None = None,
        http_port: int = 0,
        dashboard_port: int = 0,
    ) -> None:
        self.storage = storage.resolve()
        ports = _free_ports()
        self._http_port = http_port or next(ports)
        self._dashboard_port = dashboard_port or next(ports)
        self._gcs_port = next(ports)
        self._agent_port = next(ports)
        self._client_port = next(ports)  # Ray Client can't be switched off; its default port is one per machine
        self._num_cpus = num_cpus
        # Unix socket paths end at 107 bytes and Ray's are long: a short parent, not TMPDIR.
        self._dir = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        self._lock = lock_directory(self._dir)
        self.env = self._environment(ports, dict(env or {}))
        self._head: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """URL of the API."""
        return f"http://{HOST}:{self._http_port}"

    @property
    def dashboard_url(self) -> str:
        """URL of Ray's dashboard and its job API."""
        return f"http://{HOST}:{self._dashboard_port}"

    @property
    def ray_address(self) -> str:
        """The address for `ray.init(address=...)`."""
        return f"{HOST}:{self._gcs_port}"

    def start(self) -> Self:
        """Returns once GET /healthz answers 200. Raises ServiceError; nothing is left running then."""
        try:
            _take_storage(self.storage)
            _require_free(self._http_port, self._dashboard_port)
            delete_abandoned(self._dir.parent)
            self._start_head()
            self._deploy()
        except BaseException:
            self.stop()
            raise
        return self

    def drain(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Stops running jobs at a checkpoint, those that reach one within `timeout_s`, and ends open tails with a last
        line. Call it before `stop`, so that no steps have to be trained again. What can't be reached is left as it
        is."""
        if self._head is None or self._head.poll() is not None:
            return
        command = [sys.executable, "-m", "trainers", "drain", f"--timeout={timeout_s}"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, timeout=timeout_s + 60, check=False)
        # Not DELETE (`serve shutdown`): that would end Serve's controller, too, which is asked below.
        with contextlib.suppress(httpx.HTTPError, ServiceError):
            self._dashboard("PUT", "/api/serve/applications/", json=serve_config() | {"applications": []})
            self._wait("the end of the API", lambda: not self._applications())

    def stop(self) -> None:
        """Ends every process of the service, including those of jobs, within about ten seconds. Idempotent.

        This doesn't cancel jobs: the log keeps them, and they go on at the next start.
        """
        processes = self.processes()
        _end(processes, signal.SIGTERM, STOP_TIMEOUT_S)
        _end(self.processes(), signal.SIGKILL, STOP_TIMEOUT_S)  # those that ignored it or were started meanwhile
        if self._head is not None:
            self._head.wait()
            self._head = None
        shutil.rmtree(self._dir, ignore_errors=True)
        self._lock.close()

    def wait(self) -> None:
        """Blocks while the service runs. Raises ServiceError when its Ray head ends by itself."""
        if self._head is not None:
            self._head.wait()
            raise ServiceError(f"the Ray head ended:\n{self._log_tail()}")

    def processes(self) -> list[psutil.Process]:
        """Every live process of this service: those in the head's session, and job drivers, which have their own."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            in_session = self._head is not None and os.getsid(process.pid) == self._head.pid
            # A process that changes its title may overwrite its environment. Of Ray's, only those in the session do.
            return in_session or process.environ().get("RAY_TMPDIR") == str(self._dir)
        except (psutil.Error, OSError):
            return False  # gone, a zombie, or another user's

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _environment(self, ports: Iterator[int], extra: dict[str, str]) -> dict[str, str]:
        haproxy = self._dir / "h"
        env = (
            {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | ray_env()
            | {
                "RAY_TMPDIR": str(self._dir),
                "RAY_ADDRESS": self.ray_address,
                # Needed on every system, despite its name: without it Ray replaces 127.0.0.1 by the machine's address.
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                # After the default of 5 s, Serve kills a proxy that is still starting on a busy machine.
                "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
                "RAY_SERVE_HAPROXY_BINARY_PATH": str(HERE / "haproxy-on-loopback"),
                # HAProxy's default files and ports are the same for every service on the machine.
                "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "c"),
                "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "s"),
                "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m"),
                "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
                "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
                "RAY_SERVE_HAPROXY_STATS_PORT": str(next(ports)),
                # HAProxy sends requests there while no replica is up. The default ports may be another service's.
                "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(next(ports)),
                "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(next(ports)),
                "RAY_SERVE_HAPROXY_METRICS_PORT": str(next(ports)),
                "TUNEWRIGHT_STORAGE": str(self.storage),
                "TUNEWRIGHT_DATA_ROOTS": os.environ.get("TUNEWRIGHT_DATA_ROOTS", str(Path.cwd())),
                "TUNEWRIGHT_MODEL_ROOTS": os.environ.get("TUNEWRIGHT_MODEL_ROOTS", str(Path.cwd())),
                # Refuses pages in a browser on this machine whose host name resolves to loopback (DNS rebinding).
                "TUNEWRIGHT_HOSTS": os.environ.get("TUNEWRIGHT_HOSTS", "localhost"),
                # Finds the console scripts of this virtual environment even if it isn't activated.
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            }
        )
        first = _free_block(REPLICA_PORTS)
        env |= {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS - 1),
        }
        env |= extra
        if env.setdefault("RAY_AUTH_MODE", "disabled") == "token" and "RAY_AUTH_TOKEN_PATH" not in extra:
            token = self._dir / "token"
            token.write_text(secrets.token_hex(32))
            token.chmod(0o600)
            env["RAY_AUTH_TOKEN_PATH"] = str(token)
        return env

    def _start_head(self) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        options = {
            "node-ip-address": HOST,
            "port": self._gcs_port,
            "dashboard-host": HOST,
            "dashboard-port": self._dashboard_port,
            "dashboard-agent-listen-port": self._agent_port,
            "ray-client-server-port": self._client_port,
            # 0: any port. Ray would otherwise reserve 10002 to 19999, where the user's ports may be.
            "min-worker-port": 0,
            "max-worker-port": 0,
            "temp-dir": self._dir,
            "object-store-memory": OBJECT_STORE_BYTES,
        }
        if self._num_cpus is not None:
            options["num-cpus"] = self._num_cpus
        command += [f"--{name}={value}" for name, value in options.items()]
        with self._head_log.open("wb") as log:
            self._head = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
        self._wait("Ray's dashboard", lambda: self._dashboard("GET", "/api/serve/applications/").is_success)

    def _deploy(self) -> None:
        config = serve_config()
        config["http_options"] = (config.get("http_options") or {}) | {"host": HOST, "port": self._http_port}
        self._wait("Serve", lambda: self._accepted(config))
        self._wait("the service", self._healthy)

    def _accepted(self, config: dict[str, Any]) -> bool:
        """Whether Serve took the config. False: try again. On a busy machine Serve gives up its own proxy, answers 5xx,
        and starts another."""
        answer = self._dashboard("PUT", "/api/serve/applications/", json=config)
        if answer.is_client_error:
            raise ServiceError(f"Serve refused serve.yaml ({answer.status_code}): {answer.text}")
        return answer.is_success

    def _healthy(self) -> bool:
        for name, application in self._applications().items():
            if application["status"] == "DEPLOY_FAILED":  # not UNHEALTHY, which a busy machine recovers from
                reasons = [d.get("message", "") for d in application.get("deployments", {}).values()]
                raise ServiceError("\n".join([f"application {name}: {application.get('message', '')}", *reasons]))
        return _http.get(f"{self.url}/healthz", timeout=5).is_success

    def _applications(self) -> dict[str, Any]:
        """Serve's applications by name, as its REST API describes them."""
        applications: dict[str, Any] = self._dashboard("GET", "/api/serve/applications/").json().get("applications", {})
        return applications

    def _dashboard(self, method: str, path: str, json: Any = None) -> httpx.Response:  # noqa: ANN401 -- any JSON value
        headers = {}
        if self.env["RAY_AUTH_MODE"] == "token":
            headers["Authorization"] = f"Bearer {Path(self.env['RAY_AUTH_TOKEN_PATH']).read_text().strip()}"
        return _http.request(method, self.dashboard_url + path, headers=headers, json=json, timeout=60)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._head is None or self._head.poll() is not None:
                raise ServiceError(f"the Ray head ended while {what} came up:\n{self._log_tail()}")
            try:
                if ready():
                    return
            except (httpx.HTTPError, ValueError):
                pass  # not listening yet, or not yet speaking JSON
            time.sleep(0.1)
        raise ServiceError(f"{what} did not come up within {START_TIMEOUT_S:.0f} s:\n{self._log_tail()}")

    @property
    def _head_log(self) -> Path:
        return self._dir / "head.log"

    def _log_tail(self) -> str:
        return "\n".join(self._head_log.read_text(errors="replace").splitlines()[-30:])


def ray_env() -> dict[str, str]:
    """The KEY=VALUE lines of ray.env."""
    lines = (line.strip() for line in (HERE / "ray.env").read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def serve_config() -> dict[str, Any]:
    """serve.yaml, as Serve's REST API takes it."""
    config: dict[str, Any] = yaml.safe_load((HERE / "serve.yaml").read_text())
    return config


def _end(processes: list[psutil.Process], how: signal.Signals, timeout_s: float) -> None:
    for process in processes:
        try:
            process.send_signal(how)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=timeout_s)


def _is_free(port: int) -> bool:
    return _bind_error(port) is None


def _bind_error(port: int) -> OSError | None:
    """Why this process can't listen on the port; None: it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error
    return None


def _free_ports() -> Iterator[int]:
    """Distinct free ports, below the range from which the kernel assigns ports."""
    for port in random.sample(range(20000, 30000), k=10000):
        if _is_free(port):
            yield port


def _free_block(size: int) -> int:
    """The first of `size` adjacent free ports."""
    starts = random.sample(range(10000, 20000 - size), k=1000)
    return next(start for start in starts if all(_is_free(port) for port in range(start, start + size)))


def _take_storage(storage: Path) -> None:
    """Creates the directory if it doesn't exist. Raises CannotStartError if it can't be created or written to, or
    another service uses it."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while True:
        try:
            storage.mkdir(parents=True, exist_ok=True)
            os.close(lock(storage / f"{LOG_FILE}.lock"))
        except StoreLockedError as error:
            if time.monotonic() < deadline:  # the service that uses it may just be ending
                time.sleep(0.1)
                continue
            pid = _service_on(storage)
            stop = f"with 'kill {pid}', or Ctrl-C in its terminal" if pid else "(if it is 'make serve', with Ctrl-C)"
            raise CannotStartError(
                f"another service is running in {storage}: stop it {stop}, "
                "or set TUNEWRIGHT_STORAGE to another directory"
            ) from error
        except OSError as error:
            raise CannotStartError(f"the storage directory {storage} can't be used: {error.strerror}") from error
        return


def _service_on(storage: Path) -> int | None:
    """The process id of the LocalService that uses a directory, or of its Ray head if only that is left."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_head = "--head" in process.cmdline() and "RAY_TMPDIR" in process.environ()
            if is_head and process.environ().get("TUNEWRIGHT_STORAGE") == str(storage):
                starter = process.parent()
                pid: int = starter.pid if starter and "serve_app.local" in starter.cmdline() else process.pid
                return pid
    return None


def _require_free(*ports: int) -> None:
    if len(set(ports)) < len(ports):
        raise CannotStartError(
            f"the API and the dashboard can't both have port {ports[0]}: choose another one for one of them"
        )
    errors = {port: error for port in ports if (error := _bind_error(port)) is not None}
    if forbidden := [str(port) for port, error in errors.items() if isinstance(error, PermissionError)]:
        raise CannotStartError(f"this user may not listen on port {', '.join(forbidden)}: choose a port from 1024 up")
    if errors:
        taken = ", ".join(map(str, errors))
        raise CannotStartError(f"port {taken} is in use: stop what listens there, or choose another port")


def port(given: str) -> int:
    """A port number from the command line. argparse's error for what is no number names this function."""
    number = int(given)
    if not 0 < number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{given} is not a port: choose one from 1 to 65535")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serve_app.local", description="Run the service on this machine.")
    parser.add_argument("--port", type=port, default=8000, help="port of the API (default: 8000)")
    parser.add_argument("--dashboard-port", type=port, default=8265, help="port of Ray's dashboard (default: 8265)")
    options = parser.parse_args()
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops the service like Ctrl-C
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under `nohup`
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # and so does closing the terminal
    try:
        storage = settings().storage
    except InvalidSettingsError as error:
        console.print(f"[red]The settings are wrong:[/red]\n{escape(str(error))}", soft_wrap=True)
        return 2
    for line in misspelled(os.environ):
        console.print(f"[yellow]{line}[/yellow]", soft_wrap=True)
    service = LocalService(storage, http_port=options.port, dashboard_port=options.dashboard_port)
    try:
        with console.status("Starting Ray and the service (about 20 s) ..."):
            service.start()
        console.print(f"API        {service.url}   (documented at {service.url}/docs)")
        console.print(f"Dashboard  {service.dashboard_url}")
        console.print(f"Ray        {service.ray_address}   (the RAY_ADDRESS of python -m events and trainers)")
        console.print(f"Storage    {escape(str(service.storage))}", soft_wrap=True)
        console.print("Ctrl-C stops it. Jobs that are running then go on at the next start.")
        service.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            console.print(
                f"Stopping running jobs at a checkpoint, within {DRAIN_TIMEOUT_S:.0f} s (Ctrl-C again: at once) ..."
            )
        with contextlib.suppress(KeyboardInterrupt):
            service.drain()
    except CannotStartError as error:
        console.print(f"[red]The service can't start:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    except ServiceError as error:
        console.print(f"[red]The service failed:[/red] {escape(str(error))}", soft_wrap=True)
        return 1
    finally:
        for impatience in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(impatience, signal.SIG_IGN)  # an interrupt while it stops would leave Ray running
        service.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
