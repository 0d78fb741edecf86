"""The training recipe: supervised fine-tuning or DPO, with any method of `trainers.methods`, on CPUs or GPUs.

Each worker calls `train`. It sets up the run and loops over the steps; `training_step` is one step, from micro-batches
to the update. The recipe knows neither Ray nor HTTP: it is a rank of torch.distributed's process group if that is
initialised, otherwise a single process. Everything it does follows from the plan, the data and the checkpoint it
resumes from, so an interrupted run has the same losses as an uninterrupted one.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from trainers.data.dataset import TokenisedDataset
from trainers.errors import CapacityError, UserError, memory_short
from trainers.methods import method_of
from trainers.models.architecture import inspect_model_dir
from trainers.planning.fitting import check_states
from trainers.planning.plan import Plan, needing_less
from trainers.training.batches import StepItems, evaluation_batches
from trainers.training.checkpoint import CheckpointWriter, Standing, Validation, load_optimizer, load_standing
from trainers.training.collate import Batch, collate
from trainers.training.distributed import Ranks, local
from trainers.training.load import build_schedule, drops, pack_size
from trainers.training.optimization import build_optimizer, build_scheduler, updating_in_backward
from trainers.training.progress_log import ProgressLog, log_summary
from trainers.training.reference import reference_of
from trainers.training.reporting import Reporter, Stopped
from trainers.training.training_model import TrainingModel, build_training_model, choose_dtype

_log = logging.getLogger("tunewright.train")


def train(
    plan: Plan,
    *,
    model_dir: Path,
    train_data: Path,
    valid_data: Path | None,
    output_dir: Path,
    reporter: Reporter,
    resume_from: Path | None,
    attempt: int = 1,
) -> None:
    """Trains `plan`, from the checkpoint directory `resume_from` if one is given. Every rank has to call it.

    `train_data` and `valid_data` are directories of prepared data (`trainers.data.dataset`); `output_dir` is shared by
    all ranks. `attempt` counts the attempts of a job; a process of an earlier one may still be writing. Each epoch ends
    with an evaluation (if there is `valid_data`) and a checkpoint. An evaluation within an epoch is followed by a
    checkpoint if its loss is the lowest so far.

    Raises Stopped, after a checkpoint, when the reporter asks to stop before the last step; UserError for what the
    job's author can fix (`loss_not_finite`, a model that can't be built or is broken); CapacityError `out_of_memory` or
    `does_not_fit`; InfrastructureError `checkpoint_unreadable` or `reference_missing`.
    """
    with _advice_when_out_of_memory(plan), ExitStack() as stack:
        # ---- configure
        ranks = Ranks.current()
        arch = inspect_model_dir(model_dir)
        if ranks.device.type == "cuda":  # for CPUs, the runner checked it before it started the workers
            check_states(plan, arch, ranks.memory_bytes())
        data = TokenisedDataset(train_data)
        valid = TokenisedDataset(valid_data) if valid_data else None
        schedule = build_schedule(plan, data, ranks.rank, ranks.world)
        progress, validation, dtype_before = load_standing(resume_from) if resume_from else Standing()
        dtype = choose_dtype(plan, ranks, dtype_before)
        total_steps = schedule.total_steps(progress)

        # ---- load
        method = method_of(plan)
        model = build_training_model(plan, method, arch, model_dir, resume_from, dtype, ranks)
        copied = model.trainable().values() if model.copies else None
        optimizer = build_optimizer(plan, model.updated().values(), copied)
        if resume_from:
            load_optimizer(resume_from, model.updated(), optimizer)
        scheduler = build_scheduler(plan, optimizer, total_steps=total_steps, steps_done=progress.step)
        log_summary(plan, arch, model, dtype, ranks, progress, total_steps)
        reporter.started(total_steps, ranks.device_name())
        sets = {"training": data} | ({"validation": valid} if valid else {})
        resumed = resume_from is not None
        reference = reference_of(model, sets, plan.batch_size, ranks, output_dir, trained=resumed) if plan.pairs else {}
        log = ProgressLog(plan, total_steps, reporter, ranks)
        checkpoints = stack.enter_context(
            CheckpointWriter(output_dir, method, arch, model_dir, dtype, ranks, reporter, attempt, progress.step)
        )

        # ---- loop
        if valid and progress.step == 0:
            log.evaluated(progress, evaluate(model, valid, plan.batch_size, ranks, reference.get("validation")))
        # On CUDA packs are padded to their full size: kernels are compiled for one width.
        pad_to = pack_size(plan) if ranks.device.type == "cuda" else None
        under_way: deque[Step] = deque()  # launched, outcome not read yet
        stop = False
        for items in schedule.steps(progress):
            if _stopped_improving(plan, validation):
                log.stopped_early(validation)
                break
            micro_batches = [
                collate(data, rows, share=not drops(plan, arch), pad_to=pad_to, reference=reference.get("training"))
                for rows in items.micro_batches
            ]
            seed_step(plan.seed, progress.step, ranks.rank)
            tensors = training_step(
                plan, model, optimizer, scheduler, micro_batches, items.trained, ranks, stop=reporter.should_stop()
            )
            progress = items.after
            under_way.append(Step(items, tensors))

            # ---- read the outcomes: of all steps before a checkpoint or an evaluation, otherwise `steps_ahead` late
            at_checkpoint = progress.between_epochs or _due(progress.step, plan.save_every_n_steps)
            at_evaluation = progress.between_epochs or _due(progress.step, plan.run_val_every_n_steps)
            while len(under_way) > (0 if at_checkpoint or at_evaluation or stop else steps_ahead(ranks)):
                step = under_way.popleft()
                outcome = step.tensors.read()
                _check_finite(outcome, step.items, plan, ranks)
                log.stepped(step.items.after, step.items.epoch, outcome)
                stop = stop or outcome.stop

            # ---- evaluate and save
            if at_checkpoint or at_evaluation or stop:
                _check_weights(model, progress.step, outcome.lr, ranks)
            if valid and at_evaluation:
                evaluation = evaluate(model, valid, plan.batch_size, ranks, reference.get("validation"))
                log.evaluated(progress, evaluation)
                validation = validation.after(progress.step, evaluation.loss)
            ends_early = _stopped_improving(plan, validation)
            if at_checkpoint or stop or progress.step == validation.best_step or ends_early:
                checkpoints.save(progress, validation, log.latest(), model.updated(), optimizer)
                log.restart_clock()
            if stop and progress.step < total_steps and not ends_early:
                checkpoints.wait()
                raise Stopped(progress.step)


class StepOutcome(NamedTuple):
    """The results of one step, over all its micro-batches and all ranks.

    `loss` and the objective's `measures` are means over the trained tokens or pairs. `lr` is the learning rate of the
    step. `grad_norm` is the norm before clipping, None without `clip_grad_norm`. `stop`: some rank asks to stop.
    `losses` [ranks, micro-batches] are the sums that `loss` is computed from.
    """

    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    stop: bool
    losses: list[list[float]]
    measures: dict[str, float]


class StepTensors(NamedTuple):
    """The tensors of a StepOutcome, in host memory. On CUDA their copies from the device may still be under way;
    `arrived` is the event after these copies (otherwise None), so reading them waits for no later work."""

    losses: Tensor  # [ranks, micro-batches]
    counts: Tensor  # [tokens, ranks that wish to stop]
    grad_norm: Tensor | None  # []
    lr: float
    trained: int
    measures: Tensor  # [k], summed
    names: tuple[str, ...]  # of the measures
    arrived: torch.Event | None

    def read(self) -> StepOutcome:
        """Waits for the step to end."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens, stop = self.counts.tolist()
        norm = None if self.grad_norm is None else self.grad_norm.item()
        losses = self.losses.tolist()
        loss = sum(itertools.chain.from_iterable(losses)) / self.trained
        measures = {name: total / self.trained for name, total in zip(self.names, self.measures.tolist(), strict=True)}
        return StepOutcome(loss, self.lr, norm, int(tokens), bool(stop), losses, measures)


class Evaluation(NamedTuple):
    """Over the validation data: the mean loss, and the share of trained tokens that the model found the likeliest
    (None for DPO)."""

    loss: float
    token_accuracy: float | None


class Step(NamedTuple):
    """A step that has been launched."""

    items: StepItems
    tensors: StepTensors


def training_step(
    plan: Plan,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    micro_batches: Sequence[Batch],
    trained: int,
    ranks: Ranks,
    *,
    stop: bool = False,
) -> StepTensors:
    """One optimizer update with the gradient of the mean loss over all `trained` tokens (or pairs) of all ranks.

    `micro_batches` are this rank's; every rank has the same number of them. `stop`: this rank asks to stop after the
    step. Nothing in here waits for the device. With `updates_in_backward` (one worker, one micro-batch) the parameters
    are updated during the backward pass.
    """
    in_backward = plan.updates_in_backward
    losses = torch.zeros(ranks.world, len(micro_batches), dtype=torch.float64, device=ranks.device)
    measures = torch.zeros(len(model.objective.measures), dtype=torch.float64, device=ranks.device)
    lr = float(optimizer.param_groups[0]["lr"])
    # Turns summed losses into the mean. Scaling the gradients instead would round them once more. FSDP averages
    # gradients over the ranks, where their sum is wanted.
    share = (ranks.world if model.sharded else 1) / trained
    for number, batch in enumerate(micro_batches):
        model.reduce_gradients_in_backward(number == len(micro_batches) - 1)
        measured = model(batch.to(ranks.device, model.computed_in))  # summed over the micro-batch
        with updating_in_backward(optimizer, model.trainable().values()) if in_backward else nullcontext():
            (measured.loss * share).backward()
        losses[ranks.rank, number] = measured.loss.detach()
        measures += measured.measures

    # Add up over the ranks, clip, update.
    counts = torch.tensor([sum(batch.n_tokens for batch in micro_batches), stop], dtype=torch.float64)
    counts = counts.to(ranks.device, non_blocking=True)
    ranks.sum_all_([losses, counts, measures])
    grad_norm = None
    if not in_backward:
        gradients = model.gradients()
        if not model.sharded:
            ranks.sum_all_(gradients)
        if plan.clip_grad_norm is not None:
            grad_norm = clip(gradients, plan.clip_grad_norm, ranks, summed=not model.sharded)
        optimizer.step()
        optimizer.zero_grad()
    if scheduler:
        scheduler.step()

    arrived = None
    if ranks.device.type == "cuda":
        losses, counts, measures = (one.to("cpu", non_blocking=True) for one in (losses, counts, measures))
        grad_norm = None if grad_norm is None else grad_norm.to("cpu", non_blocking=True)
        arrived = torch.Event(ranks.device)
        arrived.record()
    return StepTensors(losses, counts, grad_norm, lr, trained, measures, model.objective.measures, arrived)


def clip(gradients: list[Tensor], max_norm: float, ranks: Ranks, *, summed: bool) -> Tensor:
    """Scales all gradients together, in place, to a 2-norm of at most `max_norm`. Returns their norm before that, [].

    `summed`: every rank has the same whole gradients, added up over the ranks. Otherwise each rank has its own shards;
    they may be offloaded to host memory, so their norm goes to the device, where nccl can add it up.
    """
    square = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).double().square().sum().to(ranks.device)
    norm = (square if summed else ranks.sum_(square)).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    torch._foreach_mul_(gradients, factor.to(gradients[0].device))
    return norm


def steps_ahead(ranks: Ranks) -> int:
    """How many further steps are launched before a step's outcome is read. On CUDA one, which keeps the device busy
    while the host reads and logs: the outcome is known one step late, but always before a checkpoint."""
    return 1 if ranks.device.type == "cuda" else 0


@torch.no_grad()
def evaluate(
    model: TrainingModel, data: TokenisedDataset, batch_size: int, ranks: Ranks, reference: Tensor | None = None
) -> Evaluation:
    """Means over all trained tokens of `data`; over its pairs if there is a `reference` (DPO). Every rank has to call
    it."""
    model.eval()
    names = model.objective.measures
    # [2 + k]: summed loss, number of trained tokens or pairs, summed measures
    total = torch.zeros(2 + len(names), dtype=torch.float64, device=ranks.device)
    for share in evaluation_batches(data.lengths, batch_size, ranks.rank, ranks.world, pairs=reference is not None):
        batch = collate(data, share, reference=reference)
        measured = model(batch.to(ranks.device, model.computed_in))
        total[0] += measured.loss
        total[1] += batch.n_trained
        total[2:] += measured.measures
    model.train()
    loss, trained, *measures = ranks.sum_(total).tolist()
    means = {name: value / trained for name, value in zip(names, measures, strict=True)}
    return Evaluation(loss / trained, means.get("token_accuracy"))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes dropout depend on seed, step and rank only, so that a checkpoint needs no random state."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _stopped_improving(plan: Plan, validation: Validation) -> bool:
    """Whether early stopping ends the run: `early_stopping_patience` evaluations without a lower loss."""
    return plan.early_stopping_patience is not None and validation.without_gain >= plan.early_stopping_patience


def _check_finite(outcome: StepOutcome, items: StepItems, plan: Plan, ranks: Ranks) -> None:
    """Raises UserError if the loss of the step is NaN or infinite: `loss_not_finite`, which names the first such
    micro-batch, whose rank logs its rows; `model_broken` in step 1, before anything was trained."""
    if math.isfinite(outcome.loss):
        return
    if items.after.step == 1:
        raise UserError(
            "model_broken",
            f"the loss of step 1 is {outcome.loss}, before anything was trained: the model's weights are broken",
            param="model",
            suggestion="start from another copy of the model",
        )
    rank, number = next(
        (rank, number)
        for rank, losses in enumerate(outcome.losses)
        for number, loss in enumerate(losses)
        if not math.isfinite(loss)
    )
    if rank == ranks.rank:
        width = 2 if plan.pairs else 1
        numbers = dict.fromkeys(row // width + 1 for item in items.micro_batches[number] for row in item)
        rows = ", ".join(map(str, numbers))
        _log.error(
            "the loss of step %d is %s; it comes from rows %s (counting only the valid ones)",
            items.after.step,
            outcome.loss,
            rows,
        )
    raise UserError(
        "loss_not_finite",
        f"the loss of step {items.after.step} is {outcome.loss}: training has diverged, first in micro-batch "
        f"{number + 1} of rank {rank} (the job's log names its rows).",
        param="fine_tuning_options.lr",
        rank=rank,
        suggestion=_calmer(outcome.lr),
    )


@torch.no_grad()
def _check_weights(model: TrainingModel, step: int, lr: float, ranks: Ranks) -> None:
    """Raises UserError `loss_not_finite` if the update of `step` left NaN or infinity in the weights. The loss would
    show it only in the next step or evaluation, after the checkpoint. Every rank has to call it."""
    # Norms in the weights' own dtype: for another one, a CPU would copy all weights.
    norms = torch._foreach_norm([local(parameter) for parameter in model.updated().values()])
    if ranks.sum([not torch.stack(norms).isfinite().all()])[0]:
        raise UserError(
            "loss_not_finite",
            f"training has diverged: the update of step {step} left weights that are not numbers.",
            param="fine_tuning_options.lr",
            suggestion=_calmer(lr),
        )


def _calmer(lr: float) -> str:
    return f"lower lr (it was {lr:g} here), set extras.clip_grad_norm, e.g. to 1.0, or use dtype fp32"


@contextmanager
def _advice_when_out_of_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_short(error):
            raise
        first_line = str(error).partition("\n")[0]
        raise CapacityError(
            "out_of_memory",
            f"a worker ran out of memory ({first_line})",
            param="fine_tuning_options.batch_size",
            suggestion="; or ".join(needing_less(plan)),
        ) from error
