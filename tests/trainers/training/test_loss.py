"""The fused head and loss against plain autograd."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchtune.modules import TiedLinear

from trainers.models.decoder import Head
from trainers.training.loss import HeadLoss, look_up

ROWS, WIDTH, VOCABULARY = 11, 8, 23


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    return hidden, torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


def output_of(kind: str, matrix: nn.Module) -> nn.Module:
    tied: nn.Module = TiedLinear(matrix)
    return {"head": matrix, "tied": tied, "module": nn.Sequential(matrix)}[kind]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [None, 1, 3, 50])
@pytest.mark.parametrize(("tied", "softcap"), [(False, None), (True, None), (True, 0.5)])
def test_loss_and_gradients_are_those_of_plain_autograd(
    smoothing: float, chunks: int | None, tied: bool, softcap: float | None
) -> None:
    hidden, labels = inputs()
    matrix = nn.Embedding(VOCABULARY, WIDTH) if tied else Head(WIDTH, VOCABULARY, bias=False)
    output = TiedLinear(matrix) if tied else matrix
    head = HeadLoss(output, VOCABULARY, softcap=softcap, label_smoothing=smoothing, chunks=chunks)
    logits = functional.linear(hidden, matrix.weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    plain = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected = torch.autograd.grad(3 * plain, [hidden, matrix.weight])
    fused, _ = head(hidden, labels)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * fused, [hidden, matrix.weight]), expected)


def test_the_loss_is_exact_where_the_label_s_probability_is_too_small_for_a_number() -> None:
    hidden, labels = (part.detach() for part in inputs())
    matrix = Head(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    hidden *= 1000
    logits = functional.linear(hidden, matrix.weight)
    plain = functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert logits.softmax(1).gather(1, labels[:, None]).min() == 0
    torch.testing.assert_close(HeadLoss(matrix, VOCABULARY)(hidden, labels)[0], plain.float())


@pytest.mark.parametrize("chunks", [None, 3, 50])
@pytest.mark.parametrize(("kind", "softcap"), [("head", None), ("tied", 0.5), ("module", None)])
def test_hits_are_the_labels_that_are_the_likeliest_token(kind: str, softcap: float | None, chunks: int | None) -> None:
    hidden, labels = inputs()
    matrix = nn.Embedding(VOCABULARY, WIDTH) if kind == "tied" else Head(WIDTH, VOCABULARY, bias=False)
    likeliest = functional.linear(hidden, matrix.weight).argmax(1)
    labels = torch.where(torch.arange(ROWS) < 4, likeliest, (likeliest + 1) % VOCABULARY)
    output = output_of(kind, matrix)
    _, hits = HeadLoss(output, VOCABULARY, softcap=softcap, chunks=chunks)(hidden, labels)
    assert hits.item() == 4
    assert not hits.requires_grad


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_get_theirs() -> None:
    hidden, labels = inputs()
    matrix = Head(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    torch.autograd.backward(HeadLoss(matrix, VOCABULARY)(hidden, labels)[0])
    assert matrix.weight.grad is None
    assert hidden.grad is not None


def test_a_head_with_layers_of_its_own_goes_through_autograd_in_chunks() -> None:
    hidden, labels = inputs()
    module = nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, VOCABULARY))
    plain = functional.cross_entropy(module(hidden), labels, reduction="sum")
    expected = torch.autograd.grad(plain, [hidden, *module.parameters()])
    fused, _ = HeadLoss(module, VOCABULARY, chunks=4)(hidden, labels)
    torch.testing.assert_close(torch.autograd.grad(fused, [hidden, *module.parameters()]), expected)


@pytest.mark.parametrize("own_layers", [False, True])
def test_no_trained_position_is_a_loss_of_zero_with_zero_gradients(own_layers: bool) -> None:
    hidden, labels = inputs()
    matrix: nn.Module = Head(WIDTH, VOCABULARY, bias=False)
    head = HeadLoss(nn.Sequential(matrix) if own_layers else matrix, VOCABULARY)
    loss, hits = head(hidden[:0], labels[:0])
    torch.autograd.backward(loss)
    assert (loss.item(), hits.item()) == (0, 0)
    assert [p.grad.abs().sum().item() for p in matrix.parameters() if p.grad is not None] == [0]


@pytest.mark.parametrize("each", [False, True])
def test_the_next_gradient_takes_the_memory_of_the_last_one_where_that_is_gone(each: bool) -> None:
    hidden, labels = inputs()
    matrix = Head(WIDTH, VOCABULARY, bias=False)
    gradients: list[Tensor] = []
    for gone in (True, False):
        head = HeadLoss(matrix, VOCABULARY, chunks=2, reuse_gradient=gone)
        for factor in (1, 3):
            matrix.zero_grad()
            loss = head.log_probabilities(hidden, labels).sum() if each else head(hidden, labels)[0]
            torch.autograd.backward(factor * loss)
            assert matrix.weight.grad is not None
            gradients.append(matrix.weight.grad)
    first, second, first_alone, second_alone = gradients
    assert first.data_ptr() == second.data_ptr() != first_alone.data_ptr() != second_alone.data_ptr()
    assert torch.equal(second, second_alone)
    torch.testing.assert_close(3 * first_alone, second_alone)


def test_without_gradients_nothing_but_the_loss_is_computed() -> None:
    hidden, labels = inputs()
    head = HeadLoss(Head(WIDTH, VOCABULARY, bias=False), VOCABULARY)
    asked: list[bool] = []
    measure = head.measure

    def watched(
        logits: Tensor, targets: Tensor, of: HeadLoss, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        asked.append(with_gradient)
        return measure(logits, targets, of, with_gradient)

    head.measure = watched
    with torch.no_grad():
        assert not head(hidden, labels)[0].requires_grad
    assert asked == [False]


@pytest.mark.parametrize("chunks", [None, 3, 50])
@pytest.mark.parametrize(("kind", "softcap"), [("head", None), ("tied", None), ("tied", 0.5), ("module", None)])
def test_log_probabilities_and_their_weighted_gradients_are_those_of_plain_autograd(
    kind: str, softcap: float | None, chunks: int | None
) -> None:
    hidden, labels = inputs()
    matrix = nn.Embedding(VOCABULARY, WIDTH) if kind == "tied" else Head(WIDTH, VOCABULARY, bias=False)
    output = output_of(kind, matrix)
    weights = torch.linspace(-1, 1, ROWS)
    logits = functional.linear(hidden, matrix.weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    plain = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = torch.autograd.grad((weights * plain).sum(), [hidden, matrix.weight])
    logps = HeadLoss(output, VOCABULARY, softcap=softcap, chunks=chunks).log_probabilities(hidden, labels)
    torch.testing.assert_close(logps, plain)
    torch.testing.assert_close(torch.autograd.grad((weights * logps).sum(), [hidden, matrix.weight]), expected)


def test_no_trained_position_has_no_log_probability_and_zero_gradients() -> None:
    hidden, labels = inputs()
    matrix = Head(WIDTH, VOCABULARY, bias=False)
    logps = HeadLoss(matrix, VOCABULARY).log_probabilities(hidden[:0], labels[:0])
    torch.autograd.backward(logps.sum())
    assert logps.shape == (0,)
    assert matrix.weight.grad is not None
    assert not matrix.weight.grad.any()


def test_with_a_vocabulary_of_real_size_the_loss_is_exact_to_a_millionth() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 64, generator=generator)
    labels = torch.randint(0, 49_152, (60,), generator=generator)
    matrix = Head(64, 49_152, bias=False)
    with torch.no_grad():
        matrix.weight.normal_(std=0.3, generator=generator)
        logits = functional.linear(hidden.double(), matrix.weight.double())
        exact = functional.cross_entropy(logits, labels, reduction="sum")
        assert HeadLoss(matrix, 49_152)(hidden, labels)[0].item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("trained", [ROWS, 0])
def test_a_tied_matrix_gets_the_gradients_of_the_head_and_of_what_is_looked_up(trained: int, each: bool) -> None:
    matrix = nn.Embedding(VOCABULARY, WIDTH)
    tokens = torch.tensor([[3, 1, 3, 0, 5, 3, 7, 8, 9, 1, 2]])
    labels = torch.arange(trained)
    hidden = torch.tanh(matrix(tokens))[0, :trained]
    plain = functional.cross_entropy(functional.linear(hidden, matrix.weight), labels, reduction="sum")
    (expected,) = torch.autograd.grad(plain, matrix.weight)
    rows, again = look_up(matrix.weight, tokens)
    head = HeadLoss(TiedLinear(matrix), VOCABULARY).reading(again)
    hidden = torch.tanh(rows)[0, :trained]
    loss = -head.log_probabilities(hidden, labels).sum() if each else head(hidden, labels)[0]
    torch.testing.assert_close(loss, plain)
    torch.autograd.backward(loss)
    torch.testing.assert_close(matrix.weight.grad, expected)


def test_gradients_of_a_token_that_stands_often_are_not_lost_in_bf16() -> None:
    """Added up one by one in bf16, the sum would stop growing after some hundred of them."""
    matrix = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    tokens = torch.tensor([[3, 1, *[5] * 4000, 1]])
    rows, again = look_up(matrix.weight, tokens)
    torch.autograd.backward((rows.float() * 0.01).sum() + (again * torch.zeros_like(again)).sum())
    assert matrix.weight.grad is not None
    assert matrix.weight.grad[[5, 3, 1, 0], 0].tolist() == pytest.approx([40, 0.01, 0.02, 0], rel=0.005)
