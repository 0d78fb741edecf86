"""DoRA, QLoRA and QAT: their layers compute the right thing; they learn, resume exactly and export exactly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import (
    Case,
    Recorder,
    known,
    make_plan_for,
    random_rows,
    saved_weights,
    store_in_bf16,
    write_rows,
)
from trainers.methods import method_of
from trainers.methods.dora import UnscaledBiasDoRALinear
from trainers.methods.lora import LeanLoRALinear
from trainers.methods.qlora import Qlora, is_quantised
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, init_rope
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec, Plan
from trainers.training.distributed import Ranks
from trainers.training.training_model import build_training_model

METHODS = ["dora", "qlora", "qat"]
EVERYWHERE = LoraSpec(mlp=True, dropout=0.2)
TOKENS = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are whole numbers of NF4 blocks. Some have biases."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", **sizes)


@pytest.fixture
def case(model_dir: Path, tmp_path: Path) -> Callable[..., Case]:
    def make(method: str, **changes: Any) -> Case:
        data = write_rows(tmp_path / "train", random_rows(12))
        return Case(make_plan_for(method, **changes), model_dir, data, tmp_path / "run")

    return make


def build(plan: Plan, model_dir: Path, resume_from: Path | None = None) -> TransformerDecoder:
    """The model that the recipe trains for `plan` on one worker."""
    arch = inspect_model_dir(model_dir)
    ranks = Ranks(0, 1, torch.device("cpu"))
    dtype = plan.dtype or "fp32"
    return build_training_model(plan, method_of(plan), arch, model_dir, resume_from, dtype, ranks).decoder.eval()


def plain_logits(model_dir: Path) -> Tensor:
    """The logits of the model in a directory, in fp32 and with plain layers."""
    arch = inspect_model_dir(model_dir)
    with torch.device("meta"):
        decoder = build_decoder(arch)
    decoder.load_state_dict(load_weights(model_dir, arch, torch.float32), assign=True)
    init_rope(decoder, "cpu")
    logits: Tensor = decoder.eval()(TOKENS)
    return logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_of_data_it_has_not_seen(
    case: Callable[..., Case], tmp_path: Path, method: str, dtype: str
) -> None:
    valid = write_rows(tmp_path / "valid", random_rows(7, seed=1))
    run = replace(case(method, dtype=dtype, n_epochs=6), valid_data=valid).run()
    losses = [known(metrics.valid_loss) for metrics in run.evaluations]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_interrupted_goes_on_to_the_bit(case: Callable[..., Case], tmp_path: Path, method: str) -> None:
    lora = None if method == "qat" else EVERYWHERE
    whole_case = case(method, lora=lora)
    whole = whole_case.run()
    first = replace(whole_case, output_dir=tmp_path / "first", stop_at=4).run()
    path = first.checkpoints[-1].path
    second = replace(whole_case, output_dir=tmp_path / "second", resume_from=path).run()
    assert first.losses | second.losses == whole.losses
    expected, resumed = (saved_weights(run.checkpoints[-1].path) for run in (whole, second))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize("method", ["dora", "qlora"])
def test_the_merged_model_computes_what_was_trained(
    case: Callable[..., Case], model_dir: Path, tmp_path: Path, method: str
) -> None:
    run = case(method, lora=LoraSpec(mlp=True, attn_modules=("q_proj", "v_proj"))).run()
    path = run.checkpoints[-1].path
    plan = make_plan_for(method, lora=LoraSpec(mlp=True, attn_modules=("q_proj", "v_proj")))
    with torch.no_grad():
        trained, merged = build(plan, model_dir, path)(TOKENS), plain_logits(path / "merged")
        assert (trained - plain_logits(model_dir)).abs().max() > 0.1, "training has no effect"
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)


def test_the_saved_quantised_base_is_the_one_the_layers_compute_with(
    case: Callable[..., Case], model_dir: Path
) -> None:
    """A layer without an adapter is saved as its dequantised 4-bit weights, bit for bit; what isn't quantised is saved
    unchanged."""
    plan = make_plan_for("qlora", lora=LoraSpec(attn_modules=("q_proj",)))
    path = case("qlora", lora=plan.lora, n_epochs=1).run().checkpoints[-1].path
    held = dict(build(plan, model_dir).named_parameters())
    saved, source = load_file(path / "merged" / "model.safetensors"), load_file(model_dir / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(saved[name], held["layers.1.mlp.w2.weight"].get_original_weight())
    assert not torch.equal(saved[name], source[name])
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
        assert torch.equal(saved[name], source[name])


def test_what_is_merged_into_a_quantised_layer_is_rounded_to_the_model_s_own_type_only(
    case: Callable[..., Case], model_dir: Path
) -> None:
    """Trained in bf16; the model is stored in fp32."""
    run = case("qlora", dtype="bf16", n_epochs=1)
    path = run.run().checkpoints[-1].path
    layer = build(run.plan, model_dir, path).layers[0].attn.q_proj
    update = layer.lora_b.weight.float() @ layer.lora_a.weight.float()
    saved = load_file(path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(saved, layer.weight.get_original_weight().float() + LoraSpec().alpha / LoraSpec().rank * update)


def test_a_quantised_base_is_written_out_in_the_type_of_training(model_dir: Path) -> None:
    """The estimate of a checkpoint's memory assumes it. The dtype in which the model is stored doesn't matter."""
    plan = make_plan_for("qlora", dtype="bf16")
    arch, method = inspect_model_dir(model_dir), method_of(plan)
    build_training_model(plan, method, arch, model_dir, None, "bf16", Ranks(0, 1, torch.device("cpu")))
    stored = load_weights(model_dir, arch)
    assert isinstance(method, Qlora)
    written = {name: weight.dtype for name, weight in method.base(stored).items() if is_quantised(name)}
    assert set(written.values()) == {torch.bfloat16}
    assert {stored[name].dtype for name in written} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_computes_as_torchtunes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = LoRALinear(128, 256, rank=4, alpha=8, use_bias=True, quantize_base=True).to(torch.float32)
    weights = {"lora_a.weight": torch.randn(4, 128), "lora_b.weight": torch.randn(256, 4), "bias": torch.randn(256)}
    weights = {name: 0.1 * value.to(dtype) for name, value in weights.items()}
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.weight = torch.nn.Parameter(NF4Tensor.from_tensor(torch.randn(256, 128, dtype=dtype), 64, 256), False)
    ours = LeanLoRALinear(128, 256, rank=4, alpha=8, dropout=0.0, use_bias=True)
    copies = {name: value.clone() for name, value in weights.items()}
    ours.load_state_dict(copies | {"weight": theirs.weight}, assign=True)
    assert_same_layer(ours, theirs, dtype, ("lora_a.weight", "lora_b.weight"))


def test_what_an_adapted_head_returns_is_no_view() -> None:
    """For a view, FSDP would warn that gradients may be wrong, in the log of every job whose head is a unit of its
    own."""
    head = LeanLoRALinear(128, 256, rank=4, alpha=8, dropout=0.0, use_bias=False)
    assert not head(torch.randn(3, 128))._is_view()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_layer_without_a_bias_computes_as_torchtunes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = DoRALinear(64, 96, rank=4, alpha=8).to(dtype)
    torch.nn.init.normal_(theirs.lora_b.weight)
    torch.nn.init.normal_(theirs.magnitude)
    ours = UnscaledBiasDoRALinear(64, 96, rank=4, alpha=8).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    assert_same_layer(ours, theirs, dtype, ("lora_a.weight", "lora_b.weight", "magnitude"))


def assert_same_layer(
    ours: torch.nn.Module, theirs: torch.nn.Module, dtype: torch.dtype, trained: tuple[str, ...]
) -> None:
    """Asserts that outputs and gradients, of the inputs and of the `trained` parameters, differ only by rounding."""
    results = []
    for layer in (ours, theirs):
        width = layer.get_parameter("lora_a.weight").shape[1]
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = layer(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
        parameters = dict(layer.named_parameters())
        results.append([out, x.grad, *(parameters[name].grad for name in trained)])
    for mine, other in zip(*results, strict=True):
        largest = other.abs().max().item()
        tolerance = largest * (1e-5 if dtype is torch.float32 else 0.02)
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)


def test_dora_starts_at_the_base_model(model_dir: Path) -> None:
    with torch.no_grad():
        logits = build(make_plan_for("dora", lora=EVERYWHERE), model_dir)(TOKENS)
    torch.testing.assert_close(logits, plain_logits(model_dir), rtol=0, atol=1e-5)


def test_dora_exports_the_model_it_starts_at_though_it_trains_mixed(model_dir: Path, tmp_path: Path) -> None:
    """An error in a row's length affects all inputs alike; it doesn't average out as rounding of weights does."""
    store_in_bf16(model_dir)
    plan, arch = make_plan_for("dora", dtype="mixed"), inspect_model_dir(model_dir)
    dora = method_of(plan)
    model = build_training_model(plan, dora, arch, model_dir, None, "mixed", Ranks.current())
    dora.save(tmp_path, {name: copy.detach() for name, copy in model.updated().items()}, arch, model_dir)
    stored, saved = (load_weights(directory, arch) for directory in (model_dir, tmp_path / "merged"))
    for name, weights in stored.items():
        assert torch.equal(saved[name], weights), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quantised_layers_take_about_a_quarter_of_bfloat16(model_dir: Path, dtype: str) -> None:
    quantised = [
        p for p in build(make_plan_for("qlora", dtype=dtype), model_dir).parameters() if isinstance(p, NF4Tensor)
    ]
    assert len(quantised) == 2 * 7
    inner = [getattr(p, name) for p in quantised for name in p.__tensor_flatten__()[0]]
    held, numbers = sum(t.untyped_storage().nbytes() for t in inner), sum(p.numel() for p in quantised)
    assert 0.25 < held / (2 * numbers) < 0.28


@pytest.mark.parametrize("family", ["llama", "mistral"])  # of which the second has a head of its own
def test_rounding_layers_compute_as_torchaos_quantizer_prepares_them(tmp_path: Path, family: str) -> None:
    model_dir = make_tiny_model(tmp_path / family, family)
    plan = make_plan_for("qat")
    arch = inspect_model_dir(model_dir)
    theirs = build_decoder(arch)
    theirs.load_state_dict(load_weights(model_dir, arch))
    Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(theirs)
    with torch.no_grad():
        logits = build(plan, model_dir)(TOKENS)
        assert torch.equal(logits, theirs.eval()(TOKENS))
    assert (logits - plain_logits(model_dir)).abs().max() > 0.01


def test_a_checkpoint_of_rounded_training_is_a_plain_model(case: Callable[..., Case], model_dir: Path) -> None:
    path = case("qat", n_epochs=1).run().checkpoints[-1].path
    saved, source = load_file(path / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in source.items()}
    assert all(not torch.equal(saved[name], source[name]) for name in source)
    assert plain_logits(path).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_compiling_and_recomputing_change_nothing_but_the_last_digits(
    case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    plain = case(method, n_epochs=1)
    other = case(method, n_epochs=1, compile=True, enable_activation_checkpointing=True)
    expected: Recorder = plain.run()
    got = replace(other, output_dir=tmp_path / "compiled").run()
    first, *later = got.losses.values()
    expected_first, *expected_later = expected.losses.values()
    assert first == pytest.approx(expected_first, abs=1e-5)
    # With QAT a last digit may decide to which of 16 values a weight is rounded in the next step.
    assert later == pytest.approx(expected_later, abs=0.05 if method == "qat" else 1e-4)
