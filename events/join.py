"""Lets a command join a Ray cluster. `ray` reads the variables set here when it is first imported."""

import logging
import os

_SETTINGS = {
    # For Linux, too: without it Ray replaces 127.0.0.1, where `make serve` is, by the machine's address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # By default, Ray tries for ten minutes to reach an address where nothing listens.
    "RAY_gcs_server_port_wait_time_s": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "2",
    "RAY_py_gcs_connect_timeout_s": "3",
}


def join_cluster() -> None:
    """Joins the cluster at RAY_ADDRESS, or the one that was last started on this machine.

    Raises ConnectionError, after some seconds, if no cluster answers, the address is invalid, or RAY_AUTH_MODE needs a
    token and there is none.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.exceptions import AuthenticationError

    from events.actors import NAMESPACE

    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    except AuthenticationError as error:
        raise ConnectionError(str(error)) from error
    except (ConnectionError, ValueError) as error:  # also if the cluster refuses calls without its token
        message = (
            f"{str(error).rstrip('.')}; set RAY_ADDRESS to that of the service's cluster, as HOST:PORT, "
            "and RAY_AUTH_MODE=token where it was started with that"
        )
        raise ConnectionError(message) from error
