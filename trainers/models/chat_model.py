"""A model that answers dialogs: a directory in Hugging Face layout, with its chat template, its tokens and its text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.training.precision import set_default_dtype

from trainers.answers import Piece, Question
from trainers.data.chat import ChatTokenizer
from trainers.errors import InfrastructureError, UserError
from trainers.models.answer_text import AnswerText, encode_question
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, init_rope
from trainers.models.generate import Continuation, advance
from trainers.models.weights import load_weights

FITS = 0.8
"""Of the free memory, what weights may take: answers need some, and so do the neighbours."""


class ChatModel:
    """Made by `load`. One thread at a time."""

    def __init__(self, decoder: TransformerDecoder, tokenizer: ChatTokenizer) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path, beside: Iterable["ChatModel"] = ()) -> Self:
        """On the GPU in bf16 where this process has one, else on the CPU in fp32.

        Tensors that a model `beside` it has too, to the bit, are shared with it: of what was tuned by adapters all
        layers without one. On the CPU, weights stored in fp32 are mapped from their files, not copied. Raises UserError
        for a directory that holds no model, InfrastructureError `no_room` where memory is short: a model must not push
        out a job.
        """
        arch = inspect_model_dir(directory)
        tokenizer = ChatTokenizer.from_dir(directory)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with set_default_dtype(dtype), torch.device("meta"):
            decoder = build_decoder(arch)
        stored = load_weights(directory, arch)
        shared = _shared(stored, [model.weights() for model in beside], device, dtype)
        _check_room({name: value for name, value in stored.items() if name not in shared}, device, dtype)
        weights = {name: value.to(device=device, dtype=dtype) for name, value in (stored | shared).items()}
        decoder.load_state_dict(weights, assign=True)
        init_rope(decoder, device)
        return cls(decoder.requires_grad_(False).eval(), tokenizer)

    def weights(self) -> dict[str, Tensor]:
        """As they are held, by the decoder's names."""
        return {name: parameter.detach() for name, parameter in self._decoder.named_parameters()}

    def prompt(self, question: Question) -> list[int]:
        """See `encode_question`."""
        return encode_question(question, self._tokenizer, self._decoder.max_seq_len)

    def begin(self, prompt: Sequence[int], question: Question) -> "Answering":
        """The answer to a `prompt` of this model's, of which nothing is known yet."""
        max_tokens = question.max_tokens or self._decoder.max_seq_len - len(prompt)
        return Answering(
            Continuation(self._decoder, prompt, max_new_tokens=max_tokens, sampling=question.sampling),
            AnswerText(self._tokenizer, question.stop, max_tokens),
        )

    def advance(self, answers: Sequence["Answering"]) -> list[Piece | UserError]:
        """One more piece of each, for one token, though its text may come with a later one. None of them may have had
        its last one; an error is the last one too."""
        tokens = advance(self._decoder, [answer.continuation for answer in answers])
        return [
            token if isinstance(token, UserError) else answer.text.add(token)
            for answer, token in zip(answers, tokens, strict=True)
        ]


@dataclass(frozen=True)
class Answering:
    """An answer under way."""

    continuation: Continuation
    text: AnswerText


def compute_on(cores: int) -> None:
    """All models of this process together, from now on."""
    torch.set_num_threads(cores)


def _shared(
    stored: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of `others` that `stored` ones become on `device` in `dtype`, to the bit. What is only mapped from
    its file is not looked at."""
    found: dict[str, Tensor] = {}
    for name, value in stored.items():
        alike = [other[name] for other in others if name in other and other[name].shape == value.shape]
        if alike and (device.type == "cuda" or value.dtype != dtype):
            here = value.to(device=device, dtype=dtype)
            twin = next((tensor for tensor in alike if torch.equal(tensor, here)), None)
            if twin is not None:
                found[name] = twin
    return found


def _check_room(stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """What is mapped from a file as it is needs no memory of its own."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # what models that are gone have left counts as taken otherwise
    needed = sum(value.numel() * dtype.itemsize for value in stored.values() if on_gpu or value.dtype != dtype)
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > FITS * free:
        message = f"the model needs {needed / 1e9:.1f} GB in memory, and {free / 1e9:.1f} GB are free"
        suggestion = "try again when less is running on that machine, or ask a smaller model"
        raise InfrastructureError("no_room", message, suggestion=suggestion)
