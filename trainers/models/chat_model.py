"""A model that answers dialogs: a directory in Hugging Face layout, with its chat template, its tokens and its text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.training.precision import set_default_dtype

from trainers.answers import Piece, Question
from trainers.data.chat import ChatTokenizer
from trainers.data.dialog import RowError
from trainers.errors import InfrastructureError, UserError
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, init_rope
from trainers.models.generate import Continuation, advance
from trainers.models.weights import load_weights

FITS = 0.8
"""Of the free memory, what weights may take: answers need some, and so do the neighbours."""
_UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


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
        """The tokens that the answer starts from: the template that the model was trained with. Raises UserError
        (param `messages`) where the template refuses them, or the context has no room for them and the answer."""
        try:
            prompt = self._tokenizer.encode_prompt(question.messages)
        except RowError as error:
            raise UserError("invalid_messages", f"{error}", "messages") from None
        context = self._decoder.max_seq_len
        if len(prompt) + (question.max_tokens or 1) > context:
            answer = f" and up to {question.max_tokens} of the answer" if question.max_tokens else ""
            message = f"the model takes {context} tokens; the messages are {len(prompt)}{answer}: send less"
            raise UserError("context_length_exceeded", message, "messages")
        return prompt

    def begin(self, prompt: Sequence[int], question: Question) -> "Answering":
        """The answer to a `prompt` of this model's, of which nothing is known yet."""
        return Answering(self._decoder, self._tokenizer, prompt, question)

    def advance(self, answers: Sequence["Answering"]) -> list[Piece | UserError]:
        """One more piece of each, for one token, though its text may come with a later one. None of them may have had
        its last one; an error is the last one too."""
        tokens = advance(self._decoder, [answer.continuation for answer in answers])
        return [
            token if isinstance(token, UserError) else answer.piece(token)
            for answer, token in zip(answers, tokens, strict=True)
        ]


class Answering:
    """An answer under way."""

    def __init__(
        self, decoder: TransformerDecoder, tokenizer: ChatTokenizer, prompt: Sequence[int], question: Question
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = question.stop
        self._max_tokens = question.max_tokens or decoder.max_seq_len - len(prompt)
        self._ids: list[int] = []
        self._sent = 0
        self.continuation = Continuation(decoder, prompt, max_new_tokens=self._max_tokens, sampling=question.sampling)

    def piece(self, token: int) -> Piece:
        """What the next `token` of the answer adds to it."""
        ended = token in self._tokenizer.eos_ids
        if not ended:
            self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if (end := _stopped(text, self._stop, self._sent)) is not None:
            return Piece(text[self._sent : end], len(self._ids), "stop")
        if ended or len(self._ids) == self._max_tokens:
            return Piece(text[self._sent :], len(self._ids), "stop" if ended else "length")
        ready = max(self._sent, len(text) - _held_back(text, self._stop))
        piece = Piece(text[self._sent : ready], len(self._ids))
        self._sent = ready
        return piece


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
    needed = sum(value.numel() * dtype.itemsize for value in stored.values() if on_gpu or value.dtype != dtype)
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > FITS * free:
        message = f"the model needs {needed / 1e9:.1f} GB in memory, and {free / 1e9:.1f} GB are free"
        suggestion = "ask again when less runs on that machine, or ask a smaller model"
        raise InfrastructureError("no_room", message, suggestion=suggestion)


def _stopped(text: str, stop: Sequence[str], sent: int) -> int | None:
    """Where the first of the stop texts begins; None where there is none. None begins in what was `sent` already."""
    found = [at for word in stop if (at := text.find(word, sent)) >= 0]
    return min(found, default=None)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may yet change: the beginning of a character or of a stop text."""
    unfinished = len(text) - len(text.rstrip(_UNFINISHED))
    begun = max(
        (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])),
        default=0,
    )
    return max(unfinished, begun)
