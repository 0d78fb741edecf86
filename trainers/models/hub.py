"""Downloads models from a Hugging Face hub, each commit once.

`HF_ENDPOINT` names the hub; `HF_TOKEN` in the worker's environment gives access to private and gated models.
"""

import errno
import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from events.disk import sync_path
from trainers.errors import (
    InfrastructureError,
    JobProblem,
    UserError,
    errno_of,
    storage_errors,
    storage_problem,
    without_secrets,
)
from trainers.models.cache import make_once
from trainers.models.model_files import incomplete
from trainers.models.names import HubModel
from trainers.models.wanted_files import choose_files, may_be_wanted

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Log = Callable[[str], None]

ANSWER_S = 30.0
"""Seconds for the hub to answer what a revision is. huggingface_hub has time limits for files, but none for this."""
AT_A_TIME = 8
"""Files that are downloaded in parallel."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_NETWORK = (errno.ETIMEDOUT, errno.ENOTCONN)
"""Errors that a network file system and any other connection can raise; during a download they are taken for the
hub's."""


def download(model: HubModel, cache_dir: Path, log: Log, *, weights: bool = True) -> Path:
    """The directory of the model at the commit that its revision points to now; downloaded if it isn't cached. If
    `weights` is false, the directory may lack the safetensors files.

    Logs the commit. If the hub can't be reached, the commit that the revision pointed to last time is used if it is
    cached, and this is logged. An architecture that can't be trained is refused before its weights are downloaded.

    Raises UserError `invalid_value`, `model_not_found`, `model_access_denied`, `model_incomplete`, `model_unsupported`;
    InfrastructureError `hub_unreachable`, `storage_full` or `storage_unreachable`.
    """
    home = cache_dir / "hub" / model.repo.replace("/", "--")
    remembered = home / "refs" / model.revision.replace("/", "--")
    try:
        commit, files = _look_up(model)
    except InfrastructureError as error:
        known = remembered.read_text().strip() if remembered.is_file() else model.revision
        cached = home / known
        if not _COMMIT.fullmatch(known) or not cached.is_dir():
            raise
        log(f"{error} Using commit {cached.name} of {model.repo}, which was downloaded before.")
        return cached
    log(f"model {model.repo}: {model.revision} is commit {commit}")
    path = home / commit
    weights = weights or path.is_dir()
    if not weights:
        path = home / f"{commit}-without-weights"
    path = make_once(path, lambda partial: _fetch(model.repo, commit, files, partial, log, weights=weights), log)
    _remember(remembered, commit)
    return path


def commit_of(directory: Path) -> str | None:
    """The commit in a directory that `download` returned; None for any other directory."""
    return directory.name if _COMMIT.fullmatch(directory.name) else None


def _look_up(model: HubModel) -> tuple[str, dict[str, int]]:
    """The commit of the revision, and its files with their sizes in bytes (0 if the hub, such as a mirror, doesn't
    say)."""
    from huggingface_hub import HfApi

    with _hub_errors(model):
        api = HfApi(endpoint=_endpoint())
        info = api.model_info(model.repo, revision=model.revision, files_metadata=True, timeout=ANSWER_S)
    return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []}


def _fetch(repo: str, commit: str, files: dict[str, int], partial: Path, log: Log, *, weights: bool) -> None:
    for begun in partial.glob(".cache/**/*.incomplete"):  # of a killed process: each file begins anew
        begun.unlink()
    for name in filter(may_be_wanted, files):  # huggingface_hub doesn't fsync: a power cut may leave an empty file
        if files[name] and (partial / name).is_file() and (partial / name).stat().st_size != files[name]:
            (partial / name).unlink()
    names = choose_files(files, partial, lambda name: _get(repo, commit, [name], partial), f"{repo} at {commit}")
    names = [name for name in names if weights or not name.endswith(".safetensors")]
    started = time.monotonic()
    log(f"downloading {len(names)} files of {repo}, {sum(files[name] for name in names) / 1e9:.2f} GB")
    _get(repo, commit, names, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # huggingface_hub's notes on how far it got
    log(f"downloaded {repo} in {time.monotonic() - started:.0f} s")


def _get(repo: str, commit: str, names: list[str], partial: Path) -> None:
    """Downloads files in parallel. (`snapshot_download` would list the repository again, without a time limit.) After
    SIGINT the threads go on until the process ends."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # they redraw a terminal line; in a log that is noise
    get = functools.partial(hf_hub_download, repo, revision=commit, local_dir=partial, endpoint=_endpoint())
    threads = ThreadPoolExecutor(AT_A_TIME)
    stopped = False
    try:
        with _hub_errors(HubModel(repo, commit)):
            list(threads.map(get, names))
    except KeyboardInterrupt:  # the files in progress may take hours
        stopped = True
        raise
    finally:
        threads.shutdown(wait=not stopped)


def _endpoint() -> str | None:
    """None: huggingface_hub's default. The library itself reads the variable only when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _remember(path: Path, commit: str) -> None:
    if path.is_file() and path.read_text().strip() == commit:
        return  # so that a cached model can be used though the disk is full
    with storage_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(f"{commit}\n")
        sync_path(new)
        new.replace(path)


@contextmanager
def _hub_errors(model: HubModel) -> Iterator[None]:
    """Turns the exceptions of huggingface_hub into errors that say who can act, and how."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except JobProblem:
        raise
    except HFValidationError as error:
        message = f"{model.repo} is not a valid name on a hub: {_reason(error)}"
        raise UserError("invalid_value", message, param="model", suggestion="check the name") from error
    except GatedRepoError as error:
        raise UserError(
            "model_access_denied",
            f"{model.repo} is gated",
            param="model",
            suggestion="accept its licence on the hub, and give the workers an HF_TOKEN of that account",
        ) from error
    except RepositoryNotFoundError as error:
        raise _not_found(model) from error
    except RevisionNotFoundError as error:
        raise UserError(
            "model_not_found",
            f"{model.repo} has no revision {model.revision!r}",
            param="model",
            suggestion="name a branch, tag or commit that it has",
        ) from error
    except LocalEntryNotFoundError as error:  # its message is always the same; the cause tells more
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _by_status(model, cause) from error
        raise _unreachable(model, cause if isinstance(cause, Exception) else error) from error
    except EntryNotFoundError as error:
        raise incomplete(f"{model.repo} at {model.revision} lacks a file: {_reason(error)}.") from error
    except HfHubHTTPError as error:
        raise _by_status(model, error) from error
    except Exception as error:  # the HTTP library, and so its exceptions, changes between huggingface_hub's releases
        of_disk = None if errno_of(error) in _OF_NETWORK else storage_problem(error)
        raise of_disk or _unreachable(model, error) from error


def _not_found(model: HubModel) -> UserError:
    return UserError(
        "model_not_found",
        f"the hub has no model {model.repo}, or it is private and the workers' HF_TOKEN doesn't open it",
        param="model",
        suggestion="check the name; a local directory is given as a path that starts with '/' or './'",
    )


def _by_status(model: HubModel, error: "HfHubHTTPError") -> JobProblem:
    """The error for an HTTP status. The hub answers 401 for a repository that doesn't exist, and for a token that it
    doesn't know."""
    status, reason = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    if status == 401 and "Invalid credentials" not in reason:
        return _not_found(model)
    if status in (401, 403):
        message = f"the hub refuses access to {model.repo}: {reason.removesuffix('.') or _reason(error)}."
        return UserError("model_access_denied", message, param="model", suggestion="check the workers' HF_TOKEN")
    return _unreachable(model, error)


def _unreachable(model: HubModel, error: Exception) -> InfrastructureError:
    endpoint = without_secrets(_endpoint() or "the Hugging Face hub")
    return InfrastructureError(
        "hub_unreachable",
        f"{model.repo} could not be fetched from {endpoint}: {_reason(error)}.",
        suggestion="check the workers' network (HF_ENDPOINT, proxy, HF_HUB_OFFLINE), or give the model as a local "
        "directory",
    )


def _reason(error: Exception) -> str:
    """The first line of the exception's message, without secrets and the final full stop."""
    lines = str(error).strip().splitlines()
    return without_secrets(lines[0]).removesuffix(".") if lines else type(error).__name__
