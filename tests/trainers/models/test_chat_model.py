"""Models that answer side by side: what two of them have in common is in memory once."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.generated import generated
from tests.tiny_models import make_tiny_model
from trainers.answers import Piece, Question, Sampling
from trainers.errors import InfrastructureError
from trainers.models import chat_model
from trainers.models.architecture import inspect_model_dir
from trainers.models.chat_model import ChatModel
from trainers.models.weights import load_weights, save_hf_model

ASKED = [{"role": "user", "content": "where is it"}]
TUNED = "layers.0.attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model stored in bf16, and the same with one layer changed, as an adapter's merged checkpoint is."""
    source = make_tiny_model(tmp_path / "source")
    arch = inspect_model_dir(source)
    weights = load_weights(source, arch, torch.bfloat16)
    save_hf_model(weights, arch, source, tmp_path / "base")
    save_hf_model({**weights, TUNED: -weights[TUNED]}, arch, source, tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def answer(model: ChatModel) -> str:
    question = Question("any", tuple(ASKED), 12, sampling=Sampling(temperature=0))
    under_way, text = model.begin(model.prompt(question), question), ""
    while True:
        (piece,) = model.advance([under_way])
        assert isinstance(piece, Piece)
        text += piece.text
        if piece.end is not None:
            return text


def test_a_tuned_model_shares_with_its_base_all_but_what_was_tuned(pair: tuple[Path, Path]) -> None:
    base = ChatModel.load(pair[0])
    tuned = ChatModel.load(pair[1], [base])
    held = base.weights()
    own = {name for name, value in tuned.weights().items() if value.data_ptr() != held[name].data_ptr()}
    assert own == {TUNED}
    answers = [answer(model) for model in (base, tuned)]
    assert answers == [generated(directory, ASKED, 12)[1] for directory in pair]
    assert answers[0] != answers[1]


def test_a_context_whose_rotary_tables_memory_has_no_room_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="in memory, and") as caught:
        ChatModel.load(make_tiny_model(tmp_path, max_position_embeddings=10**12))
    assert caught.value.error.code == "no_room"


def test_what_is_shared_needs_no_room(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = ChatModel.load(pair[0])
    needed = sum(value.numel() * 4 for value in base.weights().values())
    memory = SimpleNamespace(available=needed)  # of which a fifth has to stay free
    monkeypatch.setattr(chat_model, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    with pytest.raises(InfrastructureError, match="in memory, and"):
        ChatModel.load(pair[1])
    ChatModel.load(pair[1], [base])
