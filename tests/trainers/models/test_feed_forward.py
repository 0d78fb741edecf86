"""The feed-forward layer against torchtune's, to the bit."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchtune.modules import FeedForward

from trainers.models.architecture import Activation
from trainers.models.feed_forward import GatedFeedForward

WIDTH, INNER = 24, 56
THEIRS: dict[Activation, nn.Module] = {"silu": nn.SiLU(), "gelu_tanh": nn.GELU(approximate="tanh")}


def layers(activation: Activation, dtype: torch.dtype) -> tuple[GatedFeedForward, FeedForward, Tensor]:
    """Ours and torchtune's with the same weights, and what goes in."""
    torch.manual_seed(0)
    w1, w3 = (nn.Linear(WIDTH, INNER, bias=False, dtype=dtype) for _ in range(2))
    w2 = nn.Linear(INNER, WIDTH, bias=False, dtype=dtype)
    ours = GatedFeedForward(w1=w1, w2=w2, w3=w3, activation=activation)
    theirs = FeedForward(gate_proj=w1, down_proj=w2, up_proj=w3, activation=THEIRS[activation])
    return ours, theirs, (10 * torch.randn(2, 7, WIDTH)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", THEIRS)
def test_outputs_and_gradients_are_torchtune_s(activation: Activation, dtype: torch.dtype) -> None:
    ours, theirs, x = layers(activation, dtype)
    direction = torch.randn(2, 7, WIDTH).to(dtype)
    of_ours, of_theirs = (
        (output, *torch.autograd.grad(output, [x, *layer.parameters()], direction))
        for layer in (ours, theirs)
        for output in [layer(x)]
    )
    assert all(torch.equal(one, other) for one, other in zip(of_ours, of_theirs, strict=True))


def test_only_the_products_inputs_gate_and_value_are_kept_for_the_gradient() -> None:
    ours, _, x = layers("silu", torch.float32)
    kept: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in ours.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = ours(x)
    assert sum(kept.values()) == 14 * (WIDTH + 3 * INNER)
    assert output.requires_grad
