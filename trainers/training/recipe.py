"""The recipe: fine-tuning on answers or preferences, by any of `trainers.methods`, on workers with CPUs or GPUs.

It knows neither Ray nor HTTP. It is one rank of torch.distributed's group where that is initialised, else a process of
its own. Everything it does follows from the plan, the data and the checkpoint it resumes from, so the losses of a run
that was interrupted are those of a run that was not.
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
    """Trains `plan`, going on from the checkpoint directory `resume_from` if one is given. A job's later attempts have
    higher numbers; those before may still be writing.

    `train_data` and `valid_data` are directories of prepared data; `output_dir` is shared by all ranks. Each epoch ends
    with an evaluation (where there is `valid_data`) and a checkpoint; an evaluation within one that is the best so far
    is followed by a checkpoint too. Raises Stopped, after a checkpoint, when the reporter says so before the last step,
    UserError for what the job's author can mend (`loss_not_finite`, a model that can't be built or is broken), and
    CapacityError `out_of_memory` or `does_not_fit`.
    """
    with _advice_when_out_of_memory(plan), ExitStack() as stack:
        # ---- configure
        ranks = Ranks.current()
        arch = inspect_model_dir(model_dir)
        if ranks.device.type == "cuda":  # on the CPU it was checked before the worker was there
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
        width = pack_size(plan) if ranks.device.type == "cuda" else None  # compiled code is for one width
        under_way: deque[Step] = deque()
        stop = False
        for items in schedule.steps(progress):
            if _enough(plan, validation):
                log.stopped_early(validation)
                break
            micro_batches = [
                collate(data, rows, share=not drops(plan, arch), pad_to=width, reference=reference.get("training"))
                for rows in items.micro_batches
            ]
            seed_step(plan.seed, progress.step, ranks.rank)
            tensors = training_step(
                plan, model, optimizer, scheduler, micro_batches, items.trained, ranks, stop=reporter.should_stop()
            )
            progress = items.after
            under_way.append(Step(items, tensors))

            # ---- look
            at_checkpoint = progress.between_epochs or _due(progress.step, plan.save_every_n_steps)
            at_evaluation = progress.between_epochs or _due(progress.step, plan.run_val_every_n_steps)
            while len(under_way) > (0 if at_checkpoint or at_evaluation or stop else steps_ahead(ranks)):
                step = under_way.popleft()
                outcome = step.tensors.read()
                _check_finite(outcome, step.items, plan, ranks)
                log.stepped(step.items.after, step.items.epoch, outcome)
                stop = stop or outcome.stop

            # ---- save
            if at_checkpoint or at_evaluation or stop:
                _check_weights(model, progress.step, outcome.lr, ranks)
            if valid and at_evaluation:
                evaluation = evaluate(model, valid, plan.batch_size, ranks, reference.get("validation"))
                log.evaluated(progress, evaluation)
                validation = validation.after(progress.step, evaluation.loss)
            if at_checkpoint or stop or progress.step == validation.best_step or _enough(plan, validation):
                checkpoints.save(progress, validation, log.latest(), model.updated(), optimizer)
                log.interrupted()
            if stop and progress.step < total_steps and not _enough(plan, validation):
                checkpoints.wait()
                raise Stopped(progress.step)


class StepOutcome(NamedTuple):
    """Of one step, over all its micro-batches and all ranks. `loss` and the objective's `measures` are means over the
    trained tokens or pairs; `lr` is the rate the step was taken with; `grad_norm`, before clipping, is None unless it
    is asked for. `losses` [ranks, micro-batches] are the sums that `loss` is made of."""

    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    stop: bool
    losses: list[list[float]]
    measures: dict[str, float]


class StepTensors(NamedTuple):
    """A StepOutcome that may still be under way from the device: its tensors are the host's, and `arrived` says when
    they are filled (None: they are). What the device was told to do after that is not waited for."""

    losses: Tensor  # [ranks, micro-batches]
    counts: Tensor  # [tokens, ranks that wish to stop]
    grad_norm: Tensor | None  # []
    lr: float
    trained: int
    measures: Tensor  # [k], summed
    names: tuple[str, ...]  # of the measures
    arrived: torch.Event | None

    def read(self) -> StepOutcome:
        """Waits for the step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens, stop = self.counts.tolist()
        norm = None if self.grad_norm is None else self.grad_norm.item()
        losses = self.losses.tolist()
        loss = sum(itertools.chain.from_iterable(losses)) / self.trained
        measures = {name: total / self.trained for name, total in zip(self.names, self.measures.tolist(), strict=True)}
        return StepOutcome(loss, self.lr, norm, int(tokens), bool(stop), losses, measures)


class Evaluation(NamedTuple):
    """Of the validation data: the mean loss, and the share of trained tokens that were the likeliest (None: DPO)."""

    loss: float
    token_accuracy: float | None


class Step(NamedTuple):
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
    """The training step: one update from the mean loss over all `trained` tokens (or pairs) of all ranks.

    Nothing in it waits for the device. `stop`: whether this rank wishes to stop after it.
    """
    in_backward = plan.updates_in_backward
    losses = torch.zeros(ranks.world, len(micro_batches), dtype=torch.float64, device=ranks.device)
    measures = torch.zeros(len(model.objective.measures), dtype=torch.float64, device=ranks.device)
    lr = float(optimizer.param_groups[0]["lr"])
    # From a sum to a mean, before there are gradients: they would be rounded once more. FSDP divides by the ranks.
    share = (ranks.world if model.sharded else 1) / trained
    for number, batch in enumerate(micro_batches):
        model.reduce_gradients_in_backward(number == len(micro_batches) - 1)
        measured = model(batch.to(ranks.device, model.computed_in))  # summed over the micro-batch
        with updating_in_backward(optimizer, model.trainable().values()) if in_backward else nullcontext():
            (measured.loss * share).backward()
        losses[ranks.rank, number] = measured.loss.detach()
        measures += measured.measures

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


def clip(gradients: list[Tensor], longest: float, ranks: Ranks, *, summed: bool) -> Tensor:
    """Scales all gradients together to a 2-norm of at most `longest`; returns the norm they had, shape [].

    Unless they are `summed`, each rank has its own shards; those may be offloaded to the host, whose tensors nccl can't
    add up.
    """
    square = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).double().square().sum().to(ranks.device)
    norm = (square if summed else ranks.sum_(square)).sqrt()
    too_long = (longest / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    torch._foreach_mul_(gradients, too_long.to(gradients[0].device))
    return norm


def steps_ahead(ranks: Ranks) -> int:
    """How many steps are launched before the outcome of one is looked at: on CUDA one, which keeps the device busy
    while the host looks. A step's outcome is known one step late then, but always before a checkpoint."""
    return 1 if ranks.device.type == "cuda" else 0


@torch.no_grad()
def evaluate(
    model: TrainingModel, data: TokenisedDataset, batch_size: int, ranks: Ranks, reference: Tensor | None = None
) -> Evaluation:
    """Means over all trained tokens of `data`, or with a `reference` over its pairs. Every rank has to call it."""
    model.eval()
    names = model.objective.measures
    # summed loss, trained tokens or pairs, summed measures
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
    """Dropout depends on seed, step and rank only: there is no random state to save with a checkpoint."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _enough(plan: Plan, validation: Validation) -> bool:
    """Whether the evaluations say that training has stopped to help."""
    return plan.early_stopping_patience is not None and validation.without_gain >= plan.early_stopping_patience


def _check_finite(outcome: StepOutcome, items: StepItems, plan: Plan, ranks: Ranks) -> None:
    """Raises UserError `loss_not_finite` with the micro-batch that did it; its rank logs the rows. `model_broken` where
    it was so before anything was trained."""
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
    """Raises UserError `loss_not_finite` where the update of `step` broke the model: of the loss only the next step, or
    an evaluation, would tell. Every rank has to call it."""
    # In their own type: a norm in another one makes a copy of all numbers on a CPU.
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
