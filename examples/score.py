"""Counts how many answers of a model are exactly right, with greedy generation on every row of a data file.

    python -m examples.score smollm2-135m-instruct examples/tickets/heldout.jsonl scores.json
    python -m examples.score ~/.tunewright/jobs/ftjob-.../checkpoints/step-00000040/merged ...

Writes `{"exact": 17, "rows": 60, "answers": [{"prompt", "expected", "answer"}, ...]}`. An answer is right if it equals
the row's last message, apart from white space around it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trainers.data.chat import ChatTokenizer
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder
from trainers.models.generate import generate
from trainers.models.resolve import resolve_model
from trainers.models.weights import load_weights
from trainers.settings import settings

MAX_NEW_TOKENS = 24  # the longest right answer takes 14
MAX_SEQ_LEN = 1024  # of prompt and answer together


def score(model: str, data: Path) -> dict[str, Any]:
    """`model` is an alias or a directory in Hugging Face layout. Runs on the GPU when there is one."""
    directory = Path(model) if Path(model).is_dir() else resolve_model(model, settings(), print)
    dialogs = [row["dialog"] for row in map(json.loads, data.read_bytes().splitlines())]
    tokenizer = ChatTokenizer.from_dir(directory)
    arch = inspect_model_dir(directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device(device):
        decoder = build_decoder(arch, max_seq_len=MAX_SEQ_LEN)
    decoder.load_state_dict(load_weights(directory, arch, torch.float32))
    found = generate(
        decoder,
        [tokenizer.encode_prompt(dialog[:-1]) for dialog in dialogs],
        max_new_tokens=MAX_NEW_TOKENS,
        eos_ids=set(tokenizer.eos_ids),
        pad_id=tokenizer.pad_id,
    )
    answers = [
        {"prompt": dialog[-2]["content"], "expected": dialog[-1]["content"], "answer": tokenizer.decode(ids)}
        for dialog, ids in zip(dialogs, found, strict=True)
    ]
    exact = sum(answer["answer"].strip() == answer["expected"].strip() for answer in answers)
    return {"exact": exact, "rows": len(answers), "answers": answers}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    started = time.monotonic()
    scores = score(sys.argv[1], Path(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(scores, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"{scores['exact']} of {scores['rows']} exactly right, {time.monotonic() - started:.0f} s")
