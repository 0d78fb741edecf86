"""Answers chat questions with the model of a directory in Hugging Face layout, computed by torchtune's components."""

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
from trainers.models.decoder import build_decoder, init_rope, rope_table_bytes
from trainers.models.generate import Continuation, advance
from trainers.models.weights import load_weights

FITS = 0.8
"""Share of the free memory that weights may take. Answers need some, too, and so do other processes."""


class ChatModel:
    """A model and its tokenizer, made by `load`. Not thread-safe."""

    def __init__(self, decoder: TransformerDecoder, tokenizer: ChatTokenizer) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path, beside: Iterable["ChatModel"] = ()) -> Self:
        """Loads a model: onto the GPU in bf16 if this process has one, else onto the CPU in fp32.

        Tensors that are bit-identical to those of a model in `beside` are shared with it: for models tuned with
        adapters, every layer without an adapter. On the CPU, weights stored in fp32 are memory-mapped from their files.

        Raises UserError if the directory holds no usable model, InfrastructureError `no_room` if memory is short, as
        loading must not crowd out a running job.
        """
        arch = inspect_model_dir(directory)
        tokenizer = ChatTokenizer.from_dir(directory)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with set_default_dtype(dtype), torch.device("meta"):
            decoder = build_decoder(arch)
        stored = load_weights(directory, arch)
        shared = _shared(stored, [model.weights() for model in beside], device, dtype)
        own = [value for name, value in stored.items() if name not in shared]
        _check_room(own, rope_table_bytes(arch), device, dtype)
        weights = {name: value.to(device=device, dtype=dtype) for name, value in (stored | shared).items()}
        decoder.load_state_dict(weights, assign=True)
        init_rope(decoder, device)
        return cls(decoder.requires_grad_(False).eval(), tokenizer)

    def weights(self) -> dict[str, Tensor]:
        """The parameters in memory, by the decoder's names."""
        return {name: parameter.detach() for name, parameter in self._decoder.named_parameters()}

    def prompt(self, question: Question) -> list[int]:
        """See `encode_question`."""
        return encode_question(question, self._tokenizer, self._decoder.max_seq_len)

    def begin(self, prompt: Sequence[int], question: Question) -> "Answering":
        """Begins an answer to `prompt`, which must be of this model; nothing is computed yet."""
        max_tokens = question.max_tokens or self._decoder.max_seq_len - len(prompt)
        return Answering(
            Continuation(self._decoder, prompt, max_new_tokens=max_tokens, sampling=question.sampling),
            AnswerText(self._tokenizer, question.stop, max_tokens),
        )

    def advance(self, answers: Sequence["Answering"]) -> list[Piece | UserError]:
        """Computes one more token of each answer. Its text may come with a later piece. An answer that has had a piece
        with an `end`, or an error, is over and must not be passed again."""
        tokens = advance(self._decoder, [answer.continuation for answer in answers])
        return [
            token if isinstance(token, UserError) else answer.text.add(token)
            for answer, token in zip(answers, tokens, strict=True)
        ]


@dataclass(frozen=True)
class Answering:
    """An answer that is being generated."""

    continuation: Continuation
    text: AnswerText


def compute_on(cores: int) -> None:
    """Sets the number of CPU threads for all models of this process."""
    torch.set_num_threads(cores)


def _shared(
    stored: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of `others` that are bit-identical to `stored` ones on `device` in `dtype`. Tensors that stay
    memory-mapped are not compared."""
    found: dict[str, Tensor] = {}
    for name, value in stored.items():
        alike = [other[name] for other in others if name in other and other[name].shape == value.shape]
        if alike and (device.type == "cuda" or value.dtype != dtype):
            here = value.to(device=device, dtype=dtype)
            twin = next((tensor for tensor in alike if torch.equal(tensor, here)), None)
            if twin is not None:
                found[name] = twin
    return found


def _check_room(stored: Sequence[Tensor], others: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InfrastructureError `no_room` if `stored` and `others`, which is in bytes, take too much memory.
    Memory-mapped tensors don't count."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # memory that unloaded models have left in torch's cache counts as taken otherwise
    needed = others + sum(value.numel() * dtype.itemsize for value in stored if on_gpu or value.dtype != dtype)
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > FITS * free:
        message = f"the model needs {needed / 1e9:.1f} GB in memory, and {free / 1e9:.1f} GB are free"
        suggestion = "try again when less is running on that machine, or ask a smaller model"
        raise InfrastructureError("no_room", message, suggestion=suggestion)
