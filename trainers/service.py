"""What the API and the command line use of the cluster: event log, log lines, dispatcher, webhooks, estimates."""

from events.actors import connect
from events.facts import Resources
from trainers.dispatching.admission import Capacity, for_workers, infeasible, memory_share, worker_memory
from trainers.dispatching.dispatcher_actor import DispatcherClient
from trainers.errors import ConfigProblems, Problem
from trainers.estimate import Asked, Estimator, Found
from trainers.models.architecture import Architecture
from trainers.planning.fitting import states_fit
from trainers.planning.plan import Plan
from trainers.recent import Recent
from trainers.settings import Settings
from trainers.webhooks.client import WebhooksClient


class Service:
    """Handles to the actors of one cluster. They stay valid when an actor restarts."""

    def __init__(self, settings: Settings, deployed_at: float | None = None) -> None:
        handles = connect(settings.storage)
        self.settings = settings
        self.log = handles.log
        self.logs = handles.lines
        dispatcher = DispatcherClient(settings, deployed_at)
        self.webhooks = WebhooksClient(dispatcher)
        self._whys = Recent[dict[str, str]](lambda: dispatcher.call("whys"), fresh_s=0.5, stale_s=2)
        self._capacity = Recent[Capacity](lambda: dispatcher.call("capacity"), fresh_s=5, stale_s=15)
        self._estimator = Estimator(settings)

    async def whys(self) -> dict[str, str]:
        """Why each waiting job waits, by job id."""
        return await self._whys.get()

    async def resources(self, plan: Plan, architecture: Architecture | None) -> Resources:
        """The resources that the plan's workers will reserve on this cluster. `architecture`: None if not known yet.

        Raises ConfigProblems if neither the cluster nor its autoscaler could ever provide them, or if the weights and
        the optimizer alone don't fit the memory of a worker on CPUs.
        """
        capacity = await self._capacity.get()
        use_gpu = capacity.has_gpus if self.settings.use_gpu is None else self.settings.use_gpu
        resources = for_workers(plan.nnodes, plan.nproc_per_node, self.settings.cpus_per_worker, 1 if use_gpu else 0)
        reason = infeasible(resources, capacity)
        if reason:
            raise ConfigProblems([Problem("overrides", reason, "infeasible_resources")])
        memory = worker_memory(resources, capacity)
        if architecture is not None and memory is not None and (problem := states_fit(plan, architecture, memory)):
            raise ConfigProblems([problem])
        return resources

    async def estimate(self, plan: Plan, resources: Resources) -> Found:
        """An estimate of the plan. Raises ConfigProblems and JobProblem."""
        capacity = await self._capacity.get()
        asked = Asked(
            plan=plan,
            device="cuda" if resources.gpus_per_worker else "cpu",
            worker_bytes=worker_memory(resources, capacity),
            share_bytes=memory_share(resources, capacity),
        )
        return await self._estimator.find(asked)


def start(settings: Settings, deployed_at: float | None = None) -> Service:
    """Connect to the service's actors on this Ray cluster; start those that aren't there. `deployed_at`: given by parts
    of a deploy, which brings its own dispatcher; see trainers.dispatching.dispatcher_actor.

    Raises StorageMismatchError, LogUnavailable or TimeoutError.
    """
    return Service(settings, deployed_at)
