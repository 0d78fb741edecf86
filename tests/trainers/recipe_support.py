"""What the recipe's tests share: prepared data, a plan, a reporter that remembers, and two ranks that stay up."""

import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from events.facts import StepMetrics
from tests.ports import free_ports
from trainers.planning.plan import ComponentSpec, LoraSpec, Plan
from trainers.training.recipe import train
from trainers.training.reporting import SavedCheckpoint, Stopped

T = TypeVar("T")

QUANTIZER = ComponentSpec(
    component="torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer", kwargs={"groupsize": 32}
)


def known(value: T | None) -> T:
    """The value, which is there."""
    assert value is not None
    return value


def write_rows(directory: Path, rows: Iterable[tuple[list[int], list[bool]]]) -> Path:
    """A prepared data set of (tokens, mask) rows, in the format of `trainers.data.dataset`."""
    rows = list(rows)
    directory.mkdir(parents=True, exist_ok=True)
    np.concatenate([np.array(tokens, dtype="<i4") for tokens, _ in rows]).tofile(directory / "tokens.bin")
    np.concatenate([np.array(mask, dtype="u1") for _, mask in rows]).tofile(directory / "mask.bin")
    np.cumsum([0, *(len(tokens) for tokens, _ in rows)], dtype="<i8").tofile(directory / "offsets.bin")
    return directory


class ListedRows:
    """`trainers.training.collate.Rows` in memory. `trained` has for each token whether it is trained."""

    def __init__(self, found: list[list[int]], trained: list[list[bool]]) -> None:
        self._found = [(np.array(row), np.array(mask)) for row, mask in zip(found, trained, strict=True)]

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self._found[index]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens, _ in self._found])


def random_rows(count: int, seed: int = 0, longest: int = 24) -> list[tuple[list[int], list[bool]]]:
    """Rows with a pattern that can be learnt: each counts upwards from its first token. The first third is prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(6, longest + 1))
        start = int(rng.integers(3, 100))
        rows.append((list(range(start, start + length)), [j >= length // 3 for j in range(length)]))
    return rows


def random_pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Chosen rows that count upwards, rejected ones that count downwards from the same prompt; in turn."""
    rows = []
    for tokens, mask in random_rows(count, seed):
        prompt = mask.count(False)
        down = [tokens[prompt - 1] - j - 1 for j in range(1 + len(tokens[prompt:]) // 2)]
        rows += [(tokens, mask), (tokens[:prompt] + [100 + t for t in down], mask[: prompt + len(down)])]
    return rows


def make_plan_for(method: str = "lora", **changes: Any) -> Plan:
    """A plan in fp32, batches of two rows, two epochs, constant order unless changed."""
    adapters = method in ("lora", "dora", "qlora")
    base: dict[str, Any] = {
        "model": "tiny",
        "data": "file:///train.jsonl",
        "method": method,
        "lora": LoraSpec() if adapters else None,
        "quantizer": QUANTIZER if method == "qat" else None,
        "n_epochs": 2,
        "batch_size": 2,
        "lr": 1e-2 if adapters else 2e-3,
        "dtype": "fp32",
    }
    return Plan(**(base | changes))


@dataclass
class Recorder:
    """A Reporter that remembers everything, and asks to stop once `stop_at` steps were taken."""

    stop_at: int | None = None
    steps: list[StepMetrics] = field(default_factory=list)
    evaluations: list[StepMetrics] = field(default_factory=list)
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)
    total_steps: int = 0
    asked: int = 0

    def started(self, total_steps: int, device: str) -> None:
        self.total_steps = total_steps

    def metrics(self, metrics: StepMetrics) -> None:
        (self.steps if metrics.valid_loss is None else self.evaluations).append(metrics)

    def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        self.checkpoints.append(checkpoint)

    def deleted(self, checkpoints: list[Path]) -> None:
        assert all(path.is_dir() for path in checkpoints)
        self.gone += checkpoints

    def should_stop(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_at

    @property
    def losses(self) -> dict[int, float]:
        return {metrics.step: known(metrics.loss) for metrics in self.steps}


@dataclass
class Case:
    """One run of the recipe: everything `train` is given, so that it can be sent to another process."""

    plan: Plan
    model_dir: Path
    train_data: Path
    output_dir: Path
    valid_data: Path | None = None
    resume_from: Path | None = None
    stop_at: int | None = None
    attempt: int = 1

    def run(self, reporter: Recorder | None = None) -> Recorder:
        """Trains, here and now; a stop is no failure."""
        reporter = reporter or Recorder(self.stop_at)
        with suppress(Stopped):
            self.train(reporter)
        return reporter

    def train(self, reporter: Recorder) -> None:
        """The same; raises Stopped."""
        train(
            self.plan,
            model_dir=self.model_dir,
            train_data=self.train_data,
            valid_data=self.valid_data,
            output_dir=self.output_dir,
            reporter=reporter,
            resume_from=self.resume_from,
            attempt=self.attempt,
        )


def saved_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: of the model if it was trained in full, else of its adapter."""
    adapter = checkpoint / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else checkpoint / "model.safetensors")


def store_in_bf16(model_dir: Path) -> Path:
    """Rounds the model's weights, as those of most released models are."""
    file = model_dir / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return model_dir


class TwoRanks:
    """Two processes that form a gloo group, and run the same function together as often as asked."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        (port,) = free_ports(1)
        self._pipes, self._processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank's call returned. A rank's error fails the test with its traceback."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self._pipes]
        failures = [value for ok, value in answers if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(pipe: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except BaseException:  # noqa: BLE001  -- goes to the test that asked
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
