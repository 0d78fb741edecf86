"""Model directories with only a tokenizer, and short ways to write rows."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.tiny_models import make_tiny_model
from trainers.data.chat import ChatTokenizer
from trainers.data.dialog import Dialog
from trainers.data.rows import parse_row

CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
)
PIECE = "the children read a story about the sea "
"""Text of a few tokens."""
_CORPUS = (
    "The user asks the assistant a question about the weather in Berlin, and the assistant answers it with a tool.",
    "system user assistant model ipython Hello, how are you? Thank you, I am fine. Today Date: 26 Jul 2024",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius"}}',
)


def user(content: str | list[dict[str, str]] | None) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | list[dict[str, str]] | None, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(name: str, arguments: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}, **more}


def tool_result(content: str, **more: object) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def line(ask: str, answer: str = "yes", **more: object) -> str:
    """A line of a data file."""
    return json.dumps({"dialog": [user(ask), assistant(answer)], **more})


def dialog(*messages: dict[str, Any], **row: object) -> Dialog:
    return parse_row(json.dumps({"dialog": messages, **row}).encode())


@cache
def tokenizer_json(kind: str) -> str:
    """`bytes`: as GPT-2, Llama 3 and Qwen have it. `pieces`: as SentencePiece models: a blank before the text, bytes as
    fallback. Both with every control token of the templates, and a post-processor that must have no effect."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = []
    byte_tokens = [] if kind == "bytes" else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(byte_tokens) + 500,
        special_tokens=[*CONTROL, *byte_tokens],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in CONTROL]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    trimming = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trimming, begin]) if kind == "bytes" else begin
    return tokenizer.to_str()


def make_tokenizer(
    directory: Path, template: str | None, kind: str = "bytes", eos: str = "<|im_end|>", **config: object
) -> ChatTokenizer:
    """A ChatTokenizer read from `directory`, which is written. `config` is added to tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<|endoftext|>", **config}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return ChatTokenizer.from_dir(directory)


def with_new_tokens(directory: Path) -> ChatTokenizer:
    """Of a model whose tokenizer gained two tokens that its embedding has no rows for."""
    make_tiny_model(directory)
    tokenizer = plain_tokenizer(directory)
    tokenizer.add_tokens(["<early>", "<late>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return ChatTokenizer.from_dir(directory)


def trained(tokenizer: ChatTokenizer, row: Dialog) -> list[str]:
    """The trained text, one string per unbroken run of trained tokens."""
    ((ids, mask),) = tokenizer.encode([row])
    runs: list[list[int]] = []
    for i, id_ in enumerate(ids):
        if mask[i]:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(int(id_))
    return [text_of(tokenizer, run) for run in runs]


def text_of(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    """Text of `ids`, control tokens included."""
    return str(tokenizer._tokenizer.decode(list(ids), skip_special_tokens=False))


def plain_tokenizer(directory: Path) -> Tokenizer:
    """The library's own tokenizer: the reference for ids."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))
