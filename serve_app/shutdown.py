"""`serve shutdown` that lets the API's replicas finish what they are sending.

Serve's controller ends the proxies in the moment in which it asks the replicas to end, and open tails would break off.
It asks both again in every turn of its loop until they are gone. Here the proxies are asked only once the replicas are.

Ray has no option for that. It calls `proxies_last` where its controller starts, as `ray.env` tells it to, and two
methods are replaced there; tests/service/test_local_service.py holds Ray to it.
"""

from ray.serve._private.deployment_state import DeploymentStateManager
from ray.serve._private.proxy_state import ProxyStateManager

from trainers.replacing import replace


def proxies_last() -> None:
    """To be called in the controller's process, once."""
    asked: set[DeploymentStateManager] = set()

    def deployments_first(deployments: DeploymentStateManager) -> None:
        asked.add(deployments)
        end_deployments(deployments)

    def then_proxies(proxies: ProxyStateManager) -> None:
        if all(deployments.is_ready_for_shutdown() for deployments in asked):
            end_proxies(proxies)

    end_deployments = replace(DeploymentStateManager, "shutdown", deployments_first)
    end_proxies = replace(ProxyStateManager, "shutdown", then_proxies)
