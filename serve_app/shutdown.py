"""Lets `serve shutdown` wait until the API's replicas have sent the ends of their streams.

Serve's controller asks replicas and proxies to end at the same time, which would break open tails off. It repeats that
in every turn of its loop until they are gone. Here the proxies are asked only once the replicas are gone.

Ray has no option for that. Its controller calls `proxies_last` when it starts, as `ray.env` says, and two of its
methods are replaced there; tests/service/test_local_service.py checks that it works with this version of Ray.
"""

from ray.serve._private.deployment_state import DeploymentStateManager
from ray.serve._private.proxy_state import ProxyStateManager

from trainers.replacing import replace


def proxies_last() -> None:
    """Call it once, in the process of Serve's controller."""
    asked: set[DeploymentStateManager] = set()

    def deployments_first(deployments: DeploymentStateManager) -> None:
        asked.add(deployments)
        end_deployments(deployments)

    def then_proxies(proxies: ProxyStateManager) -> None:
        if all(deployments.is_ready_for_shutdown() for deployments in asked):
            end_proxies(proxies)

    end_deployments = replace(DeploymentStateManager, "shutdown", deployments_first)
    end_proxies = replace(ProxyStateManager, "shutdown", then_proxies)
