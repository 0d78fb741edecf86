"""The embedded demo model, converted from GGUF. Its logits are compared with transformers' in test_model_parity.py."""

import json
import shutil
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from tests.trainers.models.conftest import BuildModel
from trainers.data.chat import ChatTokenizer
from trainers.models.architecture import inspect_model_dir
from trainers.models.generate import generate


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


def test_the_conversion_is_a_model_that_can_be_trained(smollm2_dir: Path) -> None:
    arch = inspect_model_dir(smollm2_dir)
    assert (arch.family, arch.num_layers, arch.hidden_size, arch.vocab_size) == ("llama", 30, 576, 49152)
    assert (arch.tied, arch.rope.theta, arch.norm_eps, arch.max_seq_len) == (True, 100000.0, 1e-5, 8192)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! It's 12345 o'clock.",
        "  two  spaces\n\n\tand tabs\r\n",
        "naïve café 日本語 🎉",
        "def f(x):\n    return x ** 2  # squares",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_text_survives_encoding_and_decoding(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_are_those_of_the_published_tokenizer(tokenizer: Tokenizer) -> None:
    """Digits one by one, words with their space, control tokens whole: the SmolLM2 vocabulary starts with them."""
    encoded = tokenizer.encode("<|im_start|>user\nin 1984<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "user", "Ċ", "in", "Ġ", "1", "9", "8", "4", "<|im_end|>"]
    assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
    assert tokenizer.get_vocab_size() == 49152


def test_its_control_tokens_are_listed_as_on_the_hub_so_that_an_export_needs_no_vocabulary(
    smollm2_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    listed = json.loads((smollm2_dir / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    control = {str(id_): token.content for id_, token in tokenizer.get_added_tokens_decoder().items()}
    assert {id_: entry["content"] for id_, entry in listed.items()} == control
    assert listed["2"] == {
        "content": "<|im_end|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2_dir / name, tmp_path / name)
    assert ChatTokenizer.from_dir(tmp_path, whole=False).eos_ids == ChatTokenizer.from_dir(smollm2_dir).eos_ids == (2,)


def test_asked_with_its_chat_template_it_knows_paris(
    smollm2_dir: Path, tokenizer: Tokenizer, build_model: BuildModel
) -> None:
    template = json.loads((smollm2_dir / "tokenizer_config.json").read_text())["chat_template"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = jinja2.Environment().from_string(template).render(messages=question, add_generation_prompt=True)  # noqa: S701  -- not HTML
    eos_id = json.loads((smollm2_dir / "generation_config.json").read_text())["eos_token_id"]
    ids = tokenizer.encode(prompt).ids
    answer = generate(build_model(smollm2_dir), [ids], max_new_tokens=16, eos_ids={eos_id}, pad_id=eos_id)[0]
    assert tokenizer.decode(answer) == "The capital of France is Paris."
