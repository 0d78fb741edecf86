"""Estimates how long a job will train, from the speed of similar jobs."""

import asyncio
from math import lcm
from statistics import median

from events.facts import Resources
from events.job import FineTuningJob
from serve_app.backend import JobLog
from trainers.errors import ConfigProblems
from trainers.estimate import Found, TimeEstimate
from trainers.planning.plan import Plan, plan_of, step_items
from trainers.planning.precision import CPU_INFO, has_bf16

PAGES = 5
"""How many pages of a hundred jobs, the last ones, are searched for similar jobs."""
FEWEST_STEPS = 2
"""Fewest steps of a run whose speed is used: the first step, which is slower, is left out."""
MOST_JOBS = 20
CPU_FLOPS, BF16_CPU_FLOPS, GPU_FLOPS = 60e9, 150e9, 100e12
"""Operations per second assumed for each CPU and each GPU that a job holds, if no similar job has run. Those of CPUs
are the lowest speeds in benchmarks/training.md: fp32 on a processor with AVX2 only, and mixed on one with bf16
instructions. The one of GPUs was not measured."""
EVALUATED = 1 / 3
"""Cost of a token in an evaluation, relative to training: an evaluation is a forward pass only."""


async def time_of(plan: Plan, resources: Resources, found: Found, log: JobLog) -> TimeEstimate:
    """The time for the tokens of all steps and evaluations, at the median speed of the last similar jobs, or else at
    the speed assumed for the device."""
    speeds = [] if plan.packed else await _speeds(plan, resources, log)
    unknown = "the speed of packed jobs isn't measured" if plan.packed else "no similar job has run here"
    if speeds:
        speed = median(speeds)
        basis = f"measured on {len(speeds)} {'job' if len(speeds) == 1 else 'jobs'}"
    elif resources.gpus_per_worker:
        speed = plan.workers * resources.gpus_per_worker * GPU_FLOPS / found.flops_per_token
        basis = f"assumed: {GPU_FLOPS:.0e} operations a second on each GPU; {unknown}"
    else:
        # Only this machine's processor is known. The workers' may differ; the default dtype in estimates of memory
        # rests on the same assumption.
        in_bf16 = plan.dtype != "fp32" and await asyncio.to_thread(has_bf16, CPU_INFO)
        flops = BF16_CPU_FLOPS if in_bf16 else CPU_FLOPS
        speed = plan.workers * resources.cpus_per_worker * flops / found.flops_per_token
        how = " (in bf16, as on the API's node)" if in_bf16 else ""
        basis = f"assumed: {flops:.2g} operations a second on each CPU{how}; {unknown}"
    tokens = found.steps * found.tokens_a_step
    if found.validation_data is not None:
        evaluations = 1 + evaluations_after(0, found.steps, plan.n_epochs, plan.run_val_every_n_steps)
        tokens += EVALUATED * evaluations * found.validation_data.tokens
    return TimeEstimate(seconds=round(tokens / speed, 1), tokens_per_second=round(speed, 1), basis=basis)


def evaluations_after(step: int, total_steps: int, n_epochs: int, every_n_steps: int | None) -> int:
    """How many evaluations follow once `step` of `total_steps` steps are done: at the end of each epoch, and every so
    many steps. (The one before the first step has been.)"""

    def multiples(period: int) -> int:
        return total_steps // period - step // period

    epoch = max(total_steps // n_epochs, 1)
    if every_n_steps is None:
        return multiples(epoch)
    return multiples(epoch) + multiples(every_n_steps) - multiples(lcm(epoch, every_n_steps))


async def _speeds(plan: Plan, resources: Resources, log: JobLog) -> list[float]:
    """Tokens per second of similar jobs, newest first. If they ran on several devices, only those on the device of the
    newest one."""
    wanted = _kind(plan)
    after: str | None = None
    found: list[tuple[str | None, float]] = []
    for _ in range(PAGES):
        jobs, more = await log.jobs(100, after)
        alike = [job for job in jobs if job.input_config.get("model") == plan.model and job.resources == resources]
        found += await asyncio.to_thread(_of_kind, alike, wanted)  # a millisecond for each, to make its plan
        if not more or len(found) >= MOST_JOBS:
            break
        after = jobs[-1].job_id
    return [speed for device, speed in found if device == found[0][0]][:MOST_JOBS]


def _of_kind(jobs: list[FineTuningJob], wanted: tuple[object, ...]) -> list[tuple[str | None, float]]:
    return [(job.device, speed) for job in jobs if (speed := _speed(job, wanted)) is not None]


def _kind(plan: Plan) -> tuple[object, ...]:
    """The settings that decide the speed of a job, for one model on the same resources."""
    return plan.method, plan.dtype, plan.enable_activation_checkpointing, plan.compile, plan.packed, plan.pairs


def _speed(job: FineTuningJob, wanted: tuple[object, ...]) -> float | None:
    """Tokens per second of the job's last run, without its first step; None if it has no other step, or the job is of
    another kind."""
    pace = job.pace
    if pace is None or job.data is None or pace.steps < FEWEST_STEPS:
        return None
    try:
        plan = plan_of(job)
    except (ConfigProblems, ValueError):  # of another version
        return None
    seconds = pace.steps_s - pace.first_s
    if _kind(plan) != wanted or seconds <= 0:
        return None
    tokens_a_step = job.data.tokens / job.data.rows * min(step_items(plan), job.data.rows)
    return tokens_a_step * (pace.steps - 1) / seconds
