"""Our recipe against torchtune's on one GPU: tokens/s, MFU and peak memory. Without Ray, and without downloads.

    python -m benchmarks.gpu                  Llama 3.2 1B and 3B, Llama 3.1 8B; LoRA and full; ours and torchtune
    python -m benchmarks.gpu --shape 8b --method lora
    python -m benchmarks.gpu --tiny           also on a CPU: shows that it works, measures nothing

**It has not been run on a GPU yet**: the tests run `--tiny` on a CPU. The goals are for one H200.

The weights are random, in the shapes of the real models, and made on the device. The data are random documents,
packed into sequences of 4,096 tokens; each token attends to its own document only, and every token is trained on. Both
contenders run in bf16 with torch.compile and fused AdamW, without activation checkpointing unless --recompute is given.
LoRA has rank 8 on the four attention projections. Each measurement is a process of its own, so one that runs out of
memory doesn't affect the others.

- *ours* is `build_training_model` and `training_step` of trainers/, as a job runs them (`_ours`).
- *torchtune* is its own recipe file, full_finetune_single_device or lora_finetune_single_device, run whole. Its
  config names a checkpointer with random weights and a dataset that counts tokens (`_stock_config`).

MFU (model FLOPs utilisation) is the share of the device's peak that the model's arithmetic takes, without recomputing:

    FLOPs per token = 2·N + 2·N + 2·T + 12·L·H·Q·s/2

This follows appendix B of the PaLM paper (Chowdhery et al., 2022, arXiv:2204.02311), which has 6·N + 12·L·H·Q·s. N is
the number of weights in matrix products (with the head, without the embedding): the forward pass and the gradient of
the inputs take 2·N each. T is the number of trained weights, whose gradients take 2·T (T = N for full, the adapters for
LoRA). There are L layers with H heads of size Q. s/2 is the mean number of positions that a token attends to: half its
document, as attention is causal.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.contender import peak_bytes
from benchmarks.report import table
from benchmarks.stock import adapter_config, model_config, recipe_class, shipped_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

METHODS = ("lora", "full")
CONTENDERS = ("ours", "torchtune")
TIMEOUT_S = 3600.0
GIB = 1 << 30

_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "1b": _LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "rope_scaling": _rope(32.0),
    },
    "3b": _LLAMA3
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "rope_scaling": _rope(32.0),
    },
    "8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rope_scaling": _rope(8.0),
        "tie_word_embeddings": False,
    },
    "tiny": _LLAMA3
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": _rope(8.0),
    },
}
GOALS = {("8b", "lora"): 14_900, ("8b", "full"): 10_200, ("3b", "lora"): 33_000, ("1b", "lora"): 77_000}
"""Tokens/s on one H200."""

PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense bf16 FLOP/s, from NVIDIA's data sheets (whose sparse rates are twice as high). The key is a part of the
device's name; the first that matches counts."""


@dataclass(frozen=True)
class Spec:
    contender: str
    shape: str
    method: str
    seq_len: int
    batch_size: int
    steps: int
    warmup: int
    recompute: bool
    compile: bool
    dtype: str


class Result(NamedTuple):
    tokens_per_second: float
    peak_bytes: int
    """Device memory, in the steps after the warm-up; on a CPU, the memory of the process, in the whole run."""
    mean_document: float
    trained: int
    device: str


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Spec(**json.loads(sys.argv[2])))._asdict()))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The recipe on one GPU.")
    parser.add_argument("--shape", action="append", choices=[s for s in SHAPES if s != "tiny"])
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--contender", action="append", choices=CONTENDERS)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences in a step (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured (default: 20)")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, for less memory")
    parser.add_argument("--tiny", action="store_true", help="a model of 100,000 weights, not compiled")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here; --tiny works without one")
    shapes = ["tiny"] if options.tiny else options.shape or ["1b", "3b", "8b"]
    rows: list[tuple[str, ...]] = []
    failures: list[str] = []
    for shape in shapes:
        for method in options.method or METHODS:
            for contender in options.contender or CONTENDERS:
                spec = Spec(
                    contender,
                    shape,
                    method,
                    seq_len=256 if options.tiny else 4096,
                    batch_size=options.batch_size,
                    steps=3 if options.tiny else options.steps,
                    warmup=1 if options.tiny else 5,
                    recompute=options.recompute,
                    compile=not options.tiny,
                    dtype="fp32" if options.tiny else "bf16",
                )
                print(f"{shape} {method} {contender} ...", flush=True)
                result = _in_a_process(spec)
                if isinstance(result, str):
                    failures.append(f"**{shape} {method} {contender}** failed:\n\n```text\n{result}\n```\n")
                    rows.append((shape, method, contender, "failed", "", "", ""))
                else:
                    rows.append(_row(spec, result))
    header = ("Llama", "method", "contender", "tok/s", "goal on one H200", "MFU", "peak memory")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{device}, torch {torch.__version__}, `{' '.join(['python -m benchmarks.gpu', *sys.argv[1:]])}`\n")
    print("\n".join([table(header, rows), *failures]))
    return 1 if failures else 0


def _in_a_process(spec: Spec) -> Result | str:
    """The result, or the end of the output of a process that failed, or that it took too long."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(asdict(spec))]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S:.0f} s"
    if done.returncode:
        return (done.stdout + done.stderr)[-2000:]
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def _row(spec: Spec, result: Result) -> tuple[str, ...]:
    goal = GOALS.get((spec.shape, spec.method))
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in result.device), None)
    flops = flops_per_token(SHAPES[spec.shape], result.trained, result.mean_document)
    return (
        spec.shape,
        spec.method,
        spec.contender,
        f"{result.tokens_per_second:,.0f}",
        f"{goal:,}" if goal else "",
        f"{flops * result.tokens_per_second / peak:.1%}" if peak else "device unknown",
        f"{result.peak_bytes / GIB:.1f} GiB",
    )


def flops_per_token(shape: dict[str, Any], trained: int, mean_document: float) -> float:
    """The formula of the module's docstring. `trained`: number of trained parameters; `mean_document`: number of tokens
    in the document of a token, averaged over tokens."""
    width, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    head_dim = width // heads
    attention = width * head_dim * (2 * heads + 2 * shape["num_key_value_heads"])
    weights = layers * (attention + 3 * width * ffn) + shape["vocab_size"] * width
    everything = trained > weights / 2  # full, where `trained` includes embedding and norms, which `weights` doesn't
    adapters = 0 if everything else trained
    scores = 12 * layers * heads * head_dim * mean_document / 2
    return float(4 * (weights + adapters) + 2 * min(trained, weights) + scores)


def documents(spec: Spec) -> list[np.ndarray]:
    """Random documents of a quarter of a sequence on average, enough for every step."""
    rng = np.random.default_rng(0)
    needed = (spec.steps + spec.warmup) * spec.batch_size * spec.seq_len * 2
    found: list[np.ndarray] = []
    while needed > 0:
        length = int(rng.integers(spec.seq_len // 16, spec.seq_len // 2))
        found.append(rng.integers(0, SHAPES[spec.shape]["vocab_size"], length, dtype=np.int32))
        needed -= length
    return found


def measure(spec: Spec) -> Result:
    meter = Meter(spec)
    trained = _ours(spec, meter) if spec.contender == "ours" else _stock(spec, meter)
    lengths = np.array([len(document) for document in documents(spec)])
    return Result(
        meter.tokens_per_second(),
        meter.peak_bytes(),
        float((lengths**2).sum() / lengths.sum()),
        trained,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    )


class Meter:
    """Times the steps after the warm-up. Peak memory is also counted from there, without that of making the weights."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._ends: list[float] = []
        self._tokens: list[int] = []

    def step(self, tokens: int) -> None:
        """To be called when a step over `tokens`, without padding, has been launched. It waits for the device only
        after the warm-up and at the end, so that steps may be launched ahead, as the recipe does."""
        self._tokens.append(tokens)
        done = len(self._tokens)
        if torch.cuda.is_available() and done in (self._spec.warmup, self._spec.warmup + self._spec.steps):
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())
        if torch.cuda.is_available() and done == self._spec.warmup:
            torch.cuda.reset_peak_memory_stats()

    def tokens_per_second(self) -> float:
        warmup = self._spec.warmup
        return sum(self._tokens[warmup:]) / (self._ends[-1] - self._ends[warmup - 1])

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()


# ---- ours


class _Documents:
    """Prepared data in memory. Every token but the first of a document is trained on."""

    def __init__(self, found: list[np.ndarray]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._found[index]
        return tokens, np.arange(len(tokens)) > 0

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self._found])


def _ours(spec: Spec, meter: Meter) -> int:
    """Trains, and returns the number of trained parameters."""
    from trainers.methods import method_of
    from trainers.models.architecture import Architecture, read_architecture
    from trainers.models.layout import checkpoint_tensors
    from trainers.planning.plan import ComponentSpec, LoraSpec, Plan
    from trainers.training.batches import pack
    from trainers.training.collate import collate
    from trainers.training.distributed import Ranks
    from trainers.training.optimization import build_optimizer
    from trainers.training.recipe import training_step
    from trainers.training.training_model import COMPUTED_IN, build_training_model, choose_dtype

    ranks = Ranks.current()
    arch = read_architecture(SHAPES[spec.shape] | {"max_position_embeddings": spec.seq_len})
    plan = Plan(
        model=spec.shape,
        data="",
        method="lora" if spec.method == "lora" else "full",
        lora=LoraSpec() if spec.method == "lora" else None,
        lr=1e-5,
        optimizer=ComponentSpec(component="torch.optim.AdamW", kwargs={"fused": True}),
        batch_size=spec.batch_size,
        packed=True,
        max_seq_len=spec.seq_len,
        dtype="bf16" if spec.dtype == "bf16" else "fp32",
        compile=spec.compile,
        enable_activation_checkpointing=spec.recompute,
    )

    dtype = choose_dtype(plan, ranks)

    def random_weights(model_dir: Path, arch: Architecture) -> dict[str, Tensor]:
        parts = [(part, tensor.shape[1:]) for tensor in checkpoint_tensors(arch) for part in tensor.parts]
        return {part.name: _random((part.rows, *columns), COMPUTED_IN[dtype]) for part, columns in parts}

    # Replaces the method's function that reads weights from files.
    method = method_of(plan)
    vars(sys.modules[type(method).__module__])["load_weights"] = random_weights
    model = build_training_model(plan, method, arch, Path(), None, dtype, ranks)
    optimizer = build_optimizer(plan, model.trainable().values())
    data = _Documents(documents(spec))
    packs = pack(data.lengths, spec.seq_len)
    for step in range(spec.steps + spec.warmup):
        share = packs[step * spec.batch_size : (step + 1) * spec.batch_size]
        batch = collate(data, share, pad_to=spec.seq_len)
        training_step(plan, model, optimizer, None, [batch], batch.n_trained, ranks)
        meter.step(batch.n_tokens)
    return sum(parameter.numel() for parameter in model.trainable().values())


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random weight on the device. Norms (vectors) are 1, so that activations keep their size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)


# ---- torchtune


def _stock(spec: Spec, meter: Meter) -> int:
    """Runs the whole recipe file, and returns the number of trained parameters."""
    from benchmarks import gpu_parts, stock_parts

    gpu_parts.documents = documents(spec)
    stock_parts.on_step = lambda tokens, _: meter.step(tokens)
    with redirect_stdout(sys.stderr):
        config = _stock_config(spec)
        recipe = recipe_class(spec.method, 1)(cfg=config)
        recipe.setup(cfg=config)
        recipe.train()
    return sum(parameter.numel() for parameter in recipe._model.parameters() if parameter.requires_grad)


def _stock_config(spec: Spec) -> "DictConfig":
    """The recipe's shipped config for the 8B model, with our changes."""
    config = shipped_config(f"llama3_1/8B_{spec.method}_single_device")
    for section in ("model", "tokenizer", "checkpointer", "dataset", "optimizer", "lr_scheduler", "metric_logger"):
        config.pop(section, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[spec.shape] | {"max_position_embeddings": spec.seq_len}
    model = model_config(shape, adapter_config() if spec.method == "lora" else None)
    changes: dict[str, Any] = {
        "model": model,
        "tokenizer": {"_component_": "benchmarks.stock_parts.Padding"},
        "checkpointer": {
            "_component_": "benchmarks.gpu_parts.RandomWeights",
            "model": model,
            "device": device,
            "dtype": spec.dtype,
            "model_type": "LLAMA3",  # the recipe looks at it
        },
        "dataset": {"_component_": "benchmarks.gpu_parts.Packs", "max_seq_len": spec.seq_len, "packed": True},
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 1e-5},
        "metric_logger": {"_component_": "benchmarks.stock_parts.Clock"},
        "shuffle": False,
        "batch_size": spec.batch_size,
        "gradient_accumulation_steps": 1,
        "epochs": 1,
        "max_steps_per_epoch": spec.steps + spec.warmup,
        "compile": spec.compile,
        "device": device,
        "dtype": spec.dtype,
        "enable_activation_checkpointing": spec.recompute,
        "enable_activation_offloading": False,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
    }
    if spec.method == "lora":
        changes["lr_scheduler"] = {"_component_": "benchmarks.stock_parts.constant"}
        changes["save_adapter_weights_only"] = True
    else:
        changes["optimizer_in_bwd"] = False
    config.merge_with(changes)
    return config


if __name__ == "__main__":
    sys.exit(main())
