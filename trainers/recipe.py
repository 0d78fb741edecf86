"""The recipe: supervised fine-tuning, full or LoRA, on one worker or many, on CPU or CUDA.

It knows neither Ray nor HTTP. It is one rank of torch.distributed's group where that is initialised, else a process of
its own. Everything it does follows from the plan, the data and the checkpoint it resumes from, so the losses of a run
that was interrupted are those of a run that was not.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from trainers.batches import Batch, Progress, Schedule, collate, evaluation_batches
from trainers.checkpoint import drop_older_states, load_adapter, load_optimizer, load_progress, save_checkpoint
from trainers.data.dataset import TokenisedDataset
from trainers.distributed import Ranks
from trainers.errors import UserError
from trainers.models.architecture import inspect_model_dir
from trainers.optimization import build_optimizer, build_scheduler
from trainers.plan import Plan
from trainers.progress_log import ProgressLog, log_summary
from trainers.reporting import Reporter, SavedCheckpoint, Stopped
from trainers.training_model import TrainingModel, build_training_model, choose_dtype


def train(
    plan: Plan,
    *,
    model_dir: Path,
    train_data: Path,
    valid_data: Path | None,
    output_dir: Path,
    reporter: Reporter,
    resume_from: Path | None,
) -> None:
    """Trains `plan`, going on from the checkpoint directory `resume_from` if one is given.

    `train_data` and `valid_data` are directories of prepared data; `output_dir` is shared by all ranks. Each epoch ends
    with an evaluation (where there is `valid_data`) and a checkpoint. Raises Stopped, after a checkpoint, when the
    reporter says so, and UserError for what the job's author can mend: `loss_not_finite`, `out_of_memory`, a model that
    can't be built.
    """
    with _advice_when_out_of_memory(plan):
        # ---- configure
        ranks = Ranks.current()
        dtype = choose_dtype(plan, ranks.device)
        arch = inspect_model_dir(model_dir)
        data = TokenisedDataset(train_data)
        valid = TokenisedDataset(valid_data) if valid_data else None
        schedule = build_schedule(plan, data, ranks)
        progress = load_progress(resume_from) if resume_from else Progress()
        total_steps = schedule.total_steps(progress)

        # ---- load
        weights_dir = resume_from if resume_from and plan.method == "full" else model_dir
        adapter = load_adapter(resume_from, arch, plan.lora) if resume_from and plan.lora else None
        model = build_training_model(plan, arch, weights_dir, adapter, dtype, ranks)
        optimizer = build_optimizer(plan, model.trainable().values())
        if resume_from:
            load_optimizer(resume_from, model.trainable(), optimizer)
        scheduler = build_scheduler(plan, optimizer, total_steps=total_steps, steps_done=progress.step)
        log_summary(plan, arch, model, dtype, ranks, progress, total_steps)
        reporter.started(total_steps, ranks.device_name())
        log = ProgressLog(plan, total_steps, reporter, ranks)

        # ---- loop
        if valid and progress.step == 0:
            log.evaluated(progress, evaluate(model, valid, plan.batch_size, ranks))
        for items in schedule.steps(progress):
            began = time.perf_counter()
            micro_batches = [collate(data, share, pack_size(plan)) for share in items.micro_batches]
            seed_step(plan.seed, progress.step, ranks.rank)
            outcome = training_step(
                model, optimizer, scheduler, micro_batches, ranks, plan.clip_grad_norm, reporter.should_stop
            )
            _check_finite(outcome, items.after.step)
            progress = items.after
            log.stepped(progress, items.epoch, outcome, time.perf_counter() - began)

            # ---- save
            if valid and progress.between_epochs:
                log.evaluated(progress, evaluate(model, valid, plan.batch_size, ranks))
            if progress.between_epochs or outcome.stop or _due(progress.step, plan.save_every_n_steps):
                path = save_checkpoint(output_dir, plan, arch, model_dir, model.trainable(), optimizer, progress, ranks)
                log.saved(path)
                reporter.checkpoint(SavedCheckpoint(path, progress.step, progress.epoch, log.latest()))
                if ranks.first:
                    drop_older_states(output_dir, progress.step)
            if outcome.stop:
                raise Stopped(progress.step)


class StepOutcome(NamedTuple):
    """Of one step, over all its micro-batches and all ranks. `loss` is the mean over the `trained` tokens, None where
    there are none; `lr` is the rate the step was taken with; `grad_norm`, before clipping, is None unless it is asked
    for."""

    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    trained: int
    stop: bool


def training_step(
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    micro_batches: Sequence[Batch],
    ranks: Ranks,
    clip_grad_norm: float | None,
    should_stop: Callable[[], bool],
) -> StepOutcome:
    """The training step: one update from the mean loss over all trained tokens of all micro-batches and ranks.

    Where that loss isn't finite, or no token is trained, the weights stay as they are.
    """
    loss_sum = torch.zeros((), device=ranks.device)
    for batch in micro_batches:
        loss = model(batch.to(ranks.device))  # summed over the micro-batch's trained tokens, shape []
        loss.backward()
        loss_sum += loss.detach()

    trained_here = sum(batch.n_trained for batch in micro_batches)
    tokens_here = sum(batch.n_tokens for batch in micro_batches)
    total, trained, tokens, stop = ranks.sum([loss_sum.item(), trained_here, tokens_here, should_stop()])
    loss_mean = total / trained if trained else None
    lr = float(optimizer.param_groups[0]["lr"])
    grad_norm = None

    if loss_mean is not None and math.isfinite(loss_mean):
        gradients = [parameter.grad for parameter in model.trainable().values() if parameter.grad is not None]
        # From the gradient of a sum to that of a mean; FSDP has divided by the number of ranks already.
        scale = ranks.world / trained
        if clip_grad_norm is not None:
            grad_norm = scale * _norm(gradients, ranks)
            scale *= min(1.0, clip_grad_norm / (grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ does
        for gradient in gradients:
            gradient.mul_(scale)
        optimizer.step()
    optimizer.zero_grad()
    if scheduler:
        scheduler.step()
    return StepOutcome(loss_mean, lr, grad_norm, int(tokens), int(trained), bool(stop))


def _norm(gradients: Sequence[Tensor], ranks: Ranks) -> float:
    """The 2-norm of all gradients together. Each rank adds up its own shards, wherever they are kept."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.stack([shard.float().square().sum() for shard in local]).sum()
    return math.sqrt(ranks.sum([squares.item()])[0])


@torch.no_grad()
def evaluate(model: TrainingModel, data: TokenisedDataset, batch_size: int, ranks: Ranks) -> float | None:
    """Mean loss over all trained tokens of `data`; None if there is none. Every rank has to call it."""
    model.eval()
    loss_sum, trained = 0.0, 0
    for share in evaluation_batches(data.lengths, batch_size, ranks.rank, ranks.world):
        batch = collate(data, share)
        loss_sum += float(model(batch.to(ranks.device)))
        trained += batch.n_trained
    model.train()
    total, count = ranks.sum([loss_sum, trained])
    return total / count if count else None


def build_schedule(plan: Plan, data: TokenisedDataset, ranks: Ranks) -> Schedule:
    """The steps of `plan` over `data`, as this rank takes part in them."""
    return Schedule(
        data.lengths,
        data.trained,
        n_epochs=plan.n_epochs,
        batch_size=plan.batch_size,
        accumulation=plan.gradient_accumulation_steps,
        max_steps_per_epoch=plan.max_steps_per_epoch,
        shuffle_seed=plan.seed if plan.shuffle else None,
        pack_to=pack_size(plan),
        group_by_length=plan.group_by_length and plan.shuffle and not plan.packed,
        rank=ranks.rank,
        world=ranks.world,
    )


def pack_size(plan: Plan) -> int | None:
    """Tokens in a pack; None where rows aren't packed."""
    return plan.max_seq_len if plan.packed else None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout depends on seed, step and rank only: there is no random state to save with a checkpoint."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_finite(outcome: StepOutcome, step: int) -> None:
    if outcome.loss is not None and not math.isfinite(outcome.loss):
        raise UserError(
            "loss_not_finite",
            f"the loss of step {step} is {outcome.loss}: training has diverged. Lower lr (it was {outcome.lr:g} here), "
            "set extras.clip_grad_norm, e.g. to 1.0, or use dtype fp32.",
            param="fine_tuning_options.lr",
        )


@contextmanager
def _advice_when_out_of_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in first_line:
            raise
        advice = [
            f"lower batch_size (it is {plan.batch_size}) and raise gradient_accumulation_steps",
            "lower max_seq_len",
        ]
        if not plan.enable_activation_checkpointing:
            advice.append("set enable_activation_checkpointing")
        if plan.method == "full":
            advice.append("train with LoRA")
        message = f"a worker ran out of memory ({first_line}). To need less: {', '.join(advice)}, or use more workers."
        raise UserError("out_of_memory", message, param="fine_tuning_options.batch_size") from error
