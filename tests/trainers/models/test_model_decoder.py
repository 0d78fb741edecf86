"""The decoder: what the recipe relies on. That its outputs are right is tested in test_model_parity.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, ValueType, set_model_state_dict
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import RMSNorm, TransformerSelfAttentionLayer
from torchtune.training import get_shard_conditions, set_activation_checkpointing, shard_model

from tests.tiny_models import FAMILIES, make_tiny_model
from tests.trainers.models.conftest import BuildModel
from tests.trainers.recipe_support import ListedRows
from trainers.methods.lora import adapter_parameters, initial_adapter, lora_linear
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, causal, init_rope
from trainers.models.norm import FusedRMSNorm, GemmaNorm
from trainers.models.rope import RotaryEmbedding
from trainers.models.rope_config import RopeParams
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec
from trainers.training.collate import collate

TOKENS = torch.arange(3, 43)[None]  # [1, 40]


def test_adapters_lie_exactly_where_they_were_asked_for(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path, "mistral"))
    model = build_decoder(arch, linear=lora_linear(LoraSpec(attn_modules=("q_proj", "v_proj"), mlp=True, output=True)))
    layers = {name.rpartition(".lora_")[0] for name in adapter_parameters(model)}
    expected = {
        f"layers.{n}.{m}" for n in range(2) for m in ("attn.q_proj", "attn.v_proj", "mlp.w1", "mlp.w2", "mlp.w3")
    }
    assert layers == expected | {"output"}


def test_a_fresh_adapter_changes_nothing(tmp_path: Path, build_model: BuildModel) -> None:
    lora = LoraSpec(mlp=True)
    plain = build_model(make_tiny_model(tmp_path))
    with torch.device("meta"):
        shapes = build_decoder(inspect_model_dir(tmp_path), linear=lora_linear(lora))
    adapted = build_model(tmp_path, lora=lora, adapter=initial_adapter(shapes, seed=1))
    assert torch.equal(plain(TOKENS), adapted(TOKENS))


def test_initial_adapters_depend_on_the_seed_only(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path))
    with torch.device("meta"):
        on_meta = build_decoder(arch, linear=lora_linear(LoraSpec()))
    real = build_decoder(arch, linear=lora_linear(LoraSpec()))
    first, again, other = (initial_adapter(model, seed) for model, seed in ((on_meta, 1), (real, 1), (real, 2)))
    name = "layers.0.attn.q_proj.lora_a.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= 64**-0.5
    assert first[name].abs().max() > 0.9 * 64**-0.5
    assert not first[name.replace("lora_a", "lora_b")].any()


def test_casting_or_emptying_a_model_keeps_its_rotary_tables_exact() -> None:
    rope = RotaryEmbedding(RopeParams(theta=500000.0), head_dim=64, max_seq_len=4096)
    expected = rope.cos.clone()
    assert torch.equal(rope.to(torch.bfloat16).cos, expected)
    with torch.device("meta"):
        rope = RotaryEmbedding(RopeParams(theta=500000.0), head_dim=64, max_seq_len=4096)
    assert torch.equal(rope.to_empty(device="cpu").cos, expected)


def test_a_model_for_shorter_sequences_has_the_same_outputs(tmp_path: Path, build_model: BuildModel) -> None:
    long = build_model(make_tiny_model(tmp_path))
    short = build_decoder(inspect_model_dir(tmp_path), max_seq_len=64).eval()
    short.load_state_dict(long.state_dict())
    assert torch.equal(short(TOKENS), long(TOKENS))
    assert short.layers[0].attn.pos_embeddings.cos.shape == (64, 8)


def test_our_norm_is_bit_identical_to_torchtunes_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        ours, reference = FusedRMSNorm(64).to(dtype), RMSNorm(64).to(dtype)
        outputs = ours(x.to(dtype))
        assert not recwarn.list
        assert torch.equal(outputs, reference(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_norm_and_rotation_have_the_gradients_that_autograd_finds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, d_output = (torch.randn(1, 9, 4, 16, generator=generator).to(dtype) for _ in range(2))
    norm, reference = FusedRMSNorm(16).to(dtype), RMSNorm(16).to(dtype)
    for of in (norm, reference):
        of.scale.data.copy_(torch.linspace(0.5, 1.5, 16))
    rope, positions = (
        RotaryEmbedding(RopeParams(theta=10_000.0), head_dim=16, max_seq_len=32),
        torch.arange(9)[None] + 5,
    )

    def rotated(x: torch.Tensor) -> torch.Tensor:
        cos, sin = (torch.cat([table[positions]] * 2, -1)[:, :, None] for table in (rope.cos, rope.sin))
        exact = x.float()
        return (exact * cos + torch.cat([-exact[..., 8:], exact[..., :8]], -1) * sin).to(dtype)

    for ours, plain in ((norm, reference), (lambda x: rope(x, input_pos=positions), rotated)):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [compute(one) for compute, one in zip((ours, plain), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.backward(d_output)
        torch.testing.assert_close(*(one.grad for one in inputs))
    torch.testing.assert_close(norm.scale.grad, reference.scale.grad)


def test_our_norm_for_gemma_computes_what_torchtunes_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, 9, 64, generator=generator), torch.randn(64, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        norms = [kind(64, eps=1e-6).to(dtype) for kind in (GemmaNorm, GemmaRMSNorm)]
        for norm in norms:
            norm.scale.data.copy_(scale)
        torch.testing.assert_close(norms[0](x.to(dtype)), norms[1](x.to(dtype)))


@pytest.mark.parametrize(
    ("family", "config"), [(family, {}) for family in FAMILIES] + [("mistral", {"sliding_window": 16})]
)
def test_rows_of_a_line_compute_what_each_computes_alone(
    family: str, config: dict[str, Any], tmp_path: Path, build_model: BuildModel
) -> None:
    """Outputs and gradients, though rows share what they begin with; some are longer than a window."""
    model = build_model(make_tiny_model(tmp_path, family, **config))
    a, b = list(range(3, 43)), list(range(43, 3, -1))
    found = [a, a[:21] + b[:15], a[:21] + b[:9] + a[:8], b[:28], a[:12] + b[:20], b[:3]]
    rows = ListedRows(found, trained=[[False] * (len(row) - 1) + [True] for row in found])
    batch = collate(rows, [np.arange(len(rows))], reference=torch.zeros(len(rows)))
    assert len(batch.layout.segments) > len(rows)
    assert batch.tokens.numel() < rows.lengths.sum() - 40
    seen, positions = causal(model, batch.tokens, batch.layout), batch.layout.positions
    line = model(batch.tokens, mask=seen, input_pos=positions)[0, batch.trained]
    alone = torch.stack([model(torch.tensor(row)[None, :-1])[0, -1] for row in found])[batch.places]
    torch.testing.assert_close(line, alone, rtol=0, atol=1e-5)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(out.logsumexp(-1).sum(), parameters) for out in (line, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_computes_the_same_for_wanted_positions_as_for_all(
    family: str, tmp_path: Path, build_model: BuildModel
) -> None:
    layer = build_model(make_tiny_model(tmp_path, family)).layers[-1]
    wanted = torch.tensor([3, 17, 18, 39, 0, 0])
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = [layer(x, wanted=wanted), layer(x)[:, wanted]]
    torch.testing.assert_close(*outputs)
    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_in_bfloat16(family: str, tmp_path: Path, build_model: BuildModel) -> None:
    exact = build_model(make_tiny_model(tmp_path, family))
    rough = build_model(tmp_path).to(torch.bfloat16)
    assert rough(TOKENS).isfinite().all()
    assert (rough(TOKENS) - exact(TOKENS)).abs().mean() < 0.05


def test_layers_share_the_rotary_tables_of_their_kind(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path, "gemma3_text", num_hidden_layers=4))
    first, second, third, fourth = (layer.attn.pos_embeddings for layer in build_decoder(arch).layers)
    assert first is third
    assert second is fourth
    assert (first.params.theta, second.params.theta) == (10_000.0, 1_000_000.0)


def test_activation_checkpointing_gives_the_same_gradients(tmp_path: Path, build_model: BuildModel) -> None:
    make_tiny_model(tmp_path)
    gradients = []
    for checkpointed in (False, True):
        model = build_model(tmp_path).train()
        if checkpointed:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        model(TOKENS).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.usefixtures("one_rank")
def test_a_model_on_the_meta_device_can_be_sharded_and_then_filled(
    family: str, tmp_path: Path, build_model: BuildModel
) -> None:
    """FSDP2 as torchtune applies it, with a tied and with a separate head."""
    lora = LoraSpec()
    model_dir = make_tiny_model(tmp_path / "model", family)
    arch = inspect_model_dir(model_dir)
    with torch.device("meta"):
        model = build_decoder(arch, linear=lora_linear(lora))
    adapter = initial_adapter(model, seed=0)
    shard_model(model, [get_shard_conditions], cpu_offload=False)
    assert initial_adapter(model, seed=0).keys() == adapter.keys()
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights: dict[str, ValueType] = {**load_weights(model_dir, arch), **adapter}
    set_model_state_dict(model, weights, options=options)
    init_rope(model, "cpu")
    expected = build_model(model_dir, lora=lora, adapter=adapter)(TOKENS)
    torch.testing.assert_close(model.eval()(TOKENS), expected, rtol=0, atol=1e-6)
