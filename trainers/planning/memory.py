"""How much memory a training worker needs, from its plan, the model's shapes and the heaviest micro-batch.

The estimate is the growth of a worker's resident memory (on CUDA: of the device's memory) from the moment when
everything is imported and nothing of the model is loaded, to the maximum over the whole run, checkpoints included. It
is that of rank 0, which writes the checkpoints. `benchmarks.training_memory` measures the same, and a test checks that
the two agree within `TOLERANCE`.

Symbols: N parameters of b bytes each (4, or 2 in bf16 and mixed), of which T are trained; n workers, each of which
holds 1 / n of a sharded model (n = 1 below if the model isn't sharded); P positions in the widest line of a
micro-batch, of which L carry loss; d is the width of the model.

weights      N b / n; in mixed also 4 T / n for the copies of what is trained. QLoRA holds the linear layers of the
             blocks in NF4: half a byte for each weight, a byte of scale for each 64 and 4 bytes for each 16384. In a
             sharded model, embedding and head are whole while they are used, and so are two layers. On CPUs the whole
             model counts: the gathered layers are freed between activations, so their memory stays resident.
optimizer    Its state, in the type of what it updates (in mixed: of the copies). AdamW keeps two moments (three with
             amsgrad), SGD with momentum one. 8-bit and 4-bit AdamW take 1 and 1/2 byte per number and moment.
activations  What autograd keeps of each layer for the backward pass, per position:
             - norms keep their input, and its root mean square in float32: b d + 4 bytes; likewise the norms of queries
               and keys;
             - linear layers that are trained, or that have an adapter, keep their input, once for layers that share it
               (q, k and v; gate and up); adapters keep their low-rank product, DoRA the output that it scales;
             - rotations keep sine and cosine for queries and for keys, 4 tables of half a head in float32;
             - attention keeps q, k, v, its output, and a normaliser per head. With dropout, and on a CPU with a
               soft-cap, it keeps its scores instead, a matrix over the segment's positions per head, and keys and
               values for every head. (So do GPUs for which FlexAttention can't be compiled: not counted.) On a CPU,
               if segments are short (`SHORT_SEGMENT`), it keeps only q, k and v, in float32, and sine and cosine once;
             - the gated unit keeps the gate, the value it is multiplied with, and except on CPUs the gate after its
               activation.
             In the last layer, everything behind attention exists for L positions only.
             With activation checkpointing only each layer's input (d b) is kept, and all of the above for the one layer
             that is being recomputed. In both cases the gradients that one layer's backward pass holds come on top.
output head  A chunk of logits in float32, also in the type of the weights if that is another (at most `CHUNK_ELEMENTS`
             logits and L rows, see trainers.training.loss), and with a soft-cap its slope; the gradient of L hidden
             states. If the matrix is trained, its gradient, which exists twice when the backward pass begins; on CPUs a
             bf16 gradient also once in float32 while all chunks but the first are added to it.
gradients    T b / n. They exist beside all activations only if micro-batches are accumulated. Otherwise they grow as
             the activations shrink, so the peak is at one of the two ends of the backward pass. At the second end the
             embedding's gradient exists once more, dense, before it is added to the head's. If weights are updated
             within the backward pass (`Plan.updates_in_backward`), only the gradients of a tied head exist, and those
             of the matrices that are updated together (`TOGETHER`). In mixed, gradients exist in fp32, too; for Adam
             and AdamW only a `PIECE` at a time.
checkpoint   For adapters, written while training goes on: a copy of adapters and moments, the base model's file as it
             is read, with QLoRA the dequantised 4-bit weights, and the merged matrices, one of them in float32. If the
             only checkpoint is the last one, half of that (`REUSED`) fits into memory that training has freed. Full
             fine-tuning waits for its checkpoint, and writes tensors that exist; if sharded, rank 0 gathers all weights
             and moments for it. (A tokenizer whose config doesn't list its control tokens is read for it: 800 bytes per
             word of the vocabulary, not counted.)
overhead     Buffers of libraries (`BUFFERS`), and memory that the allocator can't use. With an allocator that returns
             all freed memory (glibc's, told to map each tensor by itself) the sum of all the above is what is measured,
             to 2 %. In practice, memory that is freed in pieces of one size and requested in another stays resident: a
             measured share `FRAGMENTED` of activations. The share is smaller if gradients fit into the memory that
             activations leave. With activation checkpointing it is a share of what the layers hold one after the
             other: the next layer's activations don't fit between the gradients.

On CUDA a checkpoint is made in the host's memory, for a sharded model from one gathered matrix after the other. With
`fsdp_cpu_offload`, weights, gradients and optimizer are there, too. Unused memory that torch's allocator holds isn't
counted: it is returned when memory is short. Without a GPU (`tests/cuda`) the formula gave what was counted to 5 %,
and to 15 % with dropout. Nothing was counted on several GPUs, nor on a real one: there, only jobs whose weights and
optimizer alone don't fit are refused.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from trainers.models.architecture import Architecture
from trainers.models.layout import Part, adapts, linears, numbers_of
from trainers.planning.plan import Plan
from trainers.planning.precision import Device, default_dtype

Moment = Literal["backward", "update", "checkpoint"]
TOLERANCE = 0.15
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits in a chunk: few enough to take little memory (64 and 512 MB in float32), enough for the matrix products to run
at full speed."""
SHORT_SEGMENT = 256
"""On a CPU, attention is computed in float32 whatever the type, and in batches of segments
(`trainers.models.short_attention`), if all segments of a line are shorter than this, including the positions before
them that they attend to. For segments up to this length that took 0.3 to 0.9 of the time of PyTorch's kernel, forward
and backward, with 9 and 14 heads; for rows of 500 it took longer."""
ROUND_BF16 = 8
"""On a CPU in bf16, lines are padded to a multiple of this many positions. oneDNN prepares a dozen products for each
width, of a megabyte each, and caches a thousand: hundreds of megabytes if lines have any width."""
MODULE_CHUNKS = 8
"""Number of chunks of logits if autograd goes through the head, unless the plan says otherwise."""
FITS = 0.5
"""Each worker holds a frozen model whole if it takes at most this share of a worker's memory."""
BUFFERS = 20 << 20  # bytes
FRAGMENTED = {"full": 0.43, "adapters": 0.68, "nf4": 1.12, "checkpointing": 0.20}
REUSED = 0.5
TOGETHER = 2**22
"""If weights are updated within the backward pass: the number of weights whose gradients are collected before the
optimizer is called, as each call takes 0.1 ms however little it updates."""
PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Weights that Adam in mixed updates at a time. On CPUs five tensors of four bytes each then fit a cache of 32 MB; on a
GPU, so many calls would cost more than the cache saves."""


class Memory(BaseModel):
    """Bytes that rank 0 needs at its peak. The parts add up to the peak."""

    model_config = ConfigDict(frozen=True)

    peak_bytes: int
    moment: Moment = Field(
        description="When the peak is: as a backward pass begins, when all gradients are there, or while a checkpoint "
        "is written."
    )
    weights: int
    optimizer: int = Field(description="Its states.")
    gradients: int
    activations: int
    output_head: int = Field(description="Chunks of logits, and the gradients they leave.")
    checkpoint: int = Field(description="What is gathered, merged or copied to write a checkpoint.")
    overhead: int = Field(description="Buffers of libraries, and memory that the allocator wastes.")


class Load(NamedTuple):
    """The heaviest micro-batches, in tokens. `positions`: of the widest line; `trained`: the most in a line that carry
    loss; `segment`: the longest segment of attention, including the positions before it that it attends to."""

    positions: int
    trained: int
    segment: int


def memory_of(plan: Plan, arch: Architecture, load: Load, device: Device, worker_bytes: int | None = None) -> Memory:
    """The memory that rank 0 needs. `worker_bytes`: memory that each worker may take, which decides whether a frozen
    model is sharded; None: it isn't."""
    size = Size(plan, arch, device, worker_bytes)
    saved, in_hand = size.saved_per_position(load), size.in_hand_per_position()
    head = size.head_rows(load) * arch.vocab_size * size.head_width
    head_gradient = arch.vocab_size * arch.hidden_size * size.width if size.trains_head else 0
    added_to = size.width < 4 and device == "cpu" and size.head_rows(load) < load.trained
    in_float = 4 * head_gradient / size.width if added_to else 0
    d_hidden = load.trained * arch.hidden_size * size.width
    positions = size.computed(load.positions)
    behind = positions * (arch.num_layers - 1) + size.computed(load.trained)
    if plan.enable_activation_checkpointing:
        kept = positions * float(arch.num_layers * arch.hidden_size * size.width)
        one_layer = positions * (in_hand + sum(saved))
    else:
        kept = positions * arch.num_layers * saved.leading + behind * saved.behind
        one_layer = positions * in_hand
    accumulates = plan.gradient_accumulation_steps > 1
    # The embedding's gradient, a matrix of its own unless it is added to the head's.
    looked_up = 0 if arch.tied and size.shards == 1 and not accumulates else head_gradient
    at_once = size.together_bytes + (head_gradient if arch.tied else 0)  # it waits for the embedding's part
    in_fp32 = arch.vocab_size * arch.hidden_size * size.gradient_copy_width
    gathered = size.unit_bytes if size.shards > 1 else 0
    checkpoint = size.checkpoint_bytes()
    between = plan.n_epochs > 1 or plan.save_every_n_steps or plan.run_val_every_n_steps
    beside = 0 if plan.lora is None else checkpoint if between else REUSED * checkpoint
    moments: dict[Moment, dict[str, float]] = {
        "backward": {
            "gradients": size.gradient_bytes(whole=accumulates) if accumulates else 0,
            "activations": kept + one_layer,
            "output_head": d_hidden + max(head + head_gradient + in_float, head_gradient + looked_up),
            "checkpoint": beside,
        },
        "update": {
            "gradients": looked_up
            + (at_once + in_fp32 if plan.updates_in_backward else size.gradient_bytes(whole=accumulates, copied=True)),
            "activations": one_layer,
            "output_head": 0,
            "checkpoint": beside,
        },
        "checkpoint": {"gradients": 0, "activations": 0, "output_head": 0, "checkpoint": checkpoint},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {"weights": size.weight_bytes + gathered, "optimizer": size.optimizer_bytes, **moments[moment]}
    if plan.enable_activation_checkpointing:
        lost = FRAGMENTED["checkpointing"] * arch.num_layers * one_layer
    else:
        # NF4 weights are dequantised for each product, through index tensors of eight bytes an element.
        kind = "full" if plan.lora is None else "nf4" if plan.method == "qlora" else "adapters"
        lost = FRAGMENTED[kind] * moments["backward"]["activations"]
    parts["overhead"] = BUFFERS + (lost if device == "cpu" else 0)
    whole = {name: round(part) for name, part in parts.items()}
    return Memory(peak_bytes=sum(whole.values()), moment=moment, **whole)


def states_of(plan: Plan, arch: Architecture, device: Device, worker_bytes: int | None = None) -> int:
    """Bytes of weights and optimizer on each worker: a lower bound for any data."""
    if device == "cuda" and "Paged" in plan.optimizer.component:
        return 0  # they may be in the host's memory
    size = Size(plan, arch, device, worker_bytes)
    return round(size.weight_bytes + size.optimizer_bytes)


class _Saved(NamedTuple):
    """Bytes that a layer keeps per position: up to and including its attention, and behind it (which in the last layer
    exists for trained positions only)."""

    leading: float
    behind: float


class Size:
    """Sizes that don't depend on the data, in bytes unless stated otherwise."""

    def __init__(self, plan: Plan, arch: Architecture, device: Device, worker_bytes: int | None) -> None:
        self._plan, self._arch, self._device = plan, arch, device
        dtype = plan.dtype or default_dtype(device)
        self.width = 4 if dtype == "fp32" else 2
        self.kept_width = 2 if dtype == "bf16" else 4  # of what the optimizer updates, and of its state
        self.copy_width = 4 if dtype == "mixed" else 0
        self.gradient_copy_width = 0 if plan.fused_adam else self.copy_width
        self._linears = list(linears(arch))
        self.numbers = numbers_of(arch)
        adapter = [part for linear in self._linears for part in linear.parts if self._adapted(part)]
        columns = {part: linear.columns for linear in self._linears for part in linear.parts}
        lora = plan.lora
        self.trained = (
            self.numbers
            if lora is None
            else sum(lora.rank * (part.rows + columns[part]) for part in adapter)
            + (sum(part.rows for part in adapter) if plan.method == "dora" else 0)
        )
        self.trains_head = lora is None
        self.shards = plan.workers if self._is_sharded(worker_bytes) else 1
        self._offloads = plan.fsdp_cpu_offload and self.shards > 1 and device == "cuda"

    def computed(self, positions: int) -> int:
        """Positions of a line including its padding."""
        rounded_to = ROUND_BF16 if self._device == "cpu" and self.width == 2 else 1
        return -(-positions // rounded_to) * rounded_to

    @property
    def adapts_head(self) -> bool:
        """Whether the output head has an adapter. Then autograd goes through it, and keeps more."""
        return self._plan.lora is not None and self._plan.lora.output

    @property
    def head_width(self) -> int:
        """Bytes for each logit of a chunk."""
        if self.adapts_head:
            return 16
        return 4 + (self.width if self.width < 4 else 0) + (4 if self._arch.final_softcap else 0)

    def head_rows(self, load: Load) -> int:
        """Rows in a chunk of logits, as in `trainers.training.loss`."""
        chunks = self._plan.loss.kwargs.get("num_output_chunks") or (MODULE_CHUNKS if self.adapts_head else None)
        if chunks is not None:
            return -(-load.trained // int(chunks))
        return max(1, min(load.trained, CHUNK_ELEMENTS[self._device] // self._arch.vocab_size))

    def _adapted(self, part: Part) -> bool:
        return self._plan.lora is not None and adapts(self._plan.lora, part.name)

    def _is_sharded(self, worker_bytes: int | None) -> bool:
        """Whether the model is sharded; decided as in `trainers.training.training_model`."""
        plan = self._plan
        if plan.workers == 1 or plan.method == "qlora":
            return False
        if plan.lora is None or plan.fsdp_cpu_offload or plan.memory_efficient_fsdp_wrap:
            return True
        return worker_bytes is not None and self.numbers * self.width > FITS * worker_bytes

    @property
    def _quantised(self) -> int:
        """Number of weights that are held in 4 bits."""
        if self._plan.method != "qlora":
            return 0
        return sum(linear.rows * linear.columns for linear in self._linears if linear.parts[0].name != "output")

    @property
    def weight_bytes(self) -> float:
        if self._offloads:
            return 0
        copies = self.trained * self.copy_width
        if self._plan.lora is None:
            return (self.numbers * self.width + copies) / self.shards
        frozen = float(self.numbers * self.width)
        frozen += self._quantised * (0.5 + 1 / 64 + 4 / 16384 - self.width)
        return (frozen + self.trained * self.width + copies) / self.shards

    @property
    def optimizer_bytes(self) -> float:
        if self._offloads:
            return 0
        name, kwargs = self._plan.optimizer.component, self._plan.optimizer.kwargs
        moments = 2 + bool(kwargs.get("amsgrad"))
        if name == "torch.optim.SGD":
            moments = int(bool(kwargs.get("momentum")))
        kind = name[-4:] if name.endswith("bit") else name[-3:]
        each = {"4bit": 0.5, "8bit": 1.0, "Fp8": 1.0}.get(kind, self.kept_width)
        if name.endswith("PagedAdamW"):
            each = 4
        return self.trained * moments * each / self.shards

    def gradient_bytes(self, *, whole: bool, copied: bool = False) -> float:
        """`whole`: unsharded, as they are before they are added up over the ranks. `copied`: the size in the type of
        the copies that the optimizer updates, if that is larger."""
        if self._offloads and not whole:
            return 0
        size = self.trained * self.width / (1 if whole else self.shards)
        return max(size, self.trained * self.gradient_copy_width / self.shards) if copied else size

    @property
    def together_bytes(self) -> int:
        """Gradients of the blocks' weights that are updated together within the backward pass."""
        largest = max(linear.rows * linear.columns for linear in self._linears if linear.parts[0].name != "output")
        return self.width * min(self.trained, TOGETHER + largest)

    @property
    def unit_bytes(self) -> int:
        """The parts of a sharded model that are in memory whole, beside this worker's share."""
        arch = self._arch
        if self._device == "cpu":
            return self.numbers * self.width
        layer = sum(linear.rows * linear.columns for linear in self._linears if linear.parts[0].name != "output")
        head = arch.vocab_size * arch.hidden_size * (1 if arch.tied else 2)
        return (head + 2 * layer // arch.num_layers) * self.width

    def checkpoint_bytes(self) -> float:
        if self._device == "cuda":
            largest = max(linear.rows * linear.columns for linear in self._linears)
            embedding = self._arch.vocab_size * self._arch.hidden_size
            return max(largest, embedding) * self.kept_width if self._plan.lora is None and self.shards > 1 else 0
        if self._plan.lora is None:
            whole = self.numbers * self.kept_width + self.shards * self.optimizer_bytes
            return whole if self.shards > 1 else 0
        stored = 4 if "32" in str(self._arch.json.get("torch_dtype", self._arch.json.get("dtype", "float32"))) else 2
        adapted = [
            part.rows * linear.columns for linear in self._linears for part in linear.parts if self._adapted(part)
        ]
        copies = self.trained * self.kept_width + self._quantised * self.width + self.optimizer_bytes * self.shards
        return copies + self.numbers * stored + sum(adapted) * stored + 12 * max(adapted, default=0)

    def saved_per_position(self, load: Load) -> "_Saved":
        """What one layer keeps for the backward pass."""
        arch, b = self._arch, self.width
        d, f, queries, keys = self._widths
        norm = b * d + 4
        of_heads = b * (queries + keys) + 4 * (arch.num_heads + arch.num_kv_heads) if arch.qk_norm else 0
        leading, behind = self._inputs
        return _Saved(
            norm + of_heads + b * leading + self._attention(load),
            norm * (3 if arch.post_norms else 1) + b * behind + (2 if self._device == "cpu" else 3) * f * b,
        )

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        arch = self._arch
        return (
            arch.hidden_size,
            arch.intermediate_size,
            arch.num_heads * arch.head_dim,
            arch.num_kv_heads * arch.head_dim,
        )

    @property
    def _inputs(self) -> tuple[float, float]:
        """Numbers that the linear layers and adapters of one layer keep per position: up to its attention, and behind
        it."""
        of_one = self._linears[: (len(self._linears) - (not self._arch.tied)) // self._arch.num_layers]
        by_input: dict[str, int] = {}
        own = {True: 0.0, False: 0.0}
        lora = self._plan.lora
        for linear in of_one:
            for part in linear.parts:
                if lora is None or self._adapted(part):
                    by_input[_shared_input(part)] = linear.columns
                if lora is not None and self._adapted(part):
                    leads = _shared_input(part) == "qkv"
                    own[leads] += lora.rank + (part.rows if self._plan.method == "dora" else 0)
                    own[leads] += linear.columns * (1 + 1 / self.width) if lora.dropout else 0
        leading = by_input.pop("qkv", 0)
        return leading + own[True], sum(by_input.values()) + own[False]

    def _attention(self, load: Load) -> float:
        """Bytes per position, including its rotations."""
        arch = self._arch
        _, _, queries, keys = self._widths
        short = self._device == "cpu" and load.segment < SHORT_SEGMENT
        b = 4 if short else self.width
        capped = arch.attention_softcap is not None and self._device == "cpu"  # FlexAttention has soft-caps as well
        if capped or arch.attention_dropout:
            return 8 * arch.head_dim + 3 * queries * b + load.segment * (arch.num_heads * (4 + b) + 1)
        if short:
            return 4 * arch.head_dim + 4 * (queries + 2 * keys)
        return 8 * arch.head_dim + b * (2 * queries + 2 * keys) + 4 * arch.num_heads

    def in_hand_per_position(self) -> float:
        """Bytes of the gradients that one layer's backward pass holds at a time: of the gated unit and its inputs."""
        d, f, _, _ = self._widths
        return (3 * f + 4 * d) * self.width


def _shared_input(part: Part) -> str:
    """A name for the input of a linear layer, the same for layers that share it."""
    module = part.name.rpartition(".")[2]
    return {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "w1": "gated", "w3": "gated"}.get(module, module)
