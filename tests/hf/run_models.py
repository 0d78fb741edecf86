"""Runs model directories through transformers and peft, in the environment of tests/hf/requirements.txt.

Usage: run_models.py CASES.json. CASES is a list of objects. One process runs all of them, because importing
transformers is slow:
    model     model directory
    adapter   directory of a PEFT adapter to put on it (optional)
    tokens    [b][s] token ids, without padding
    generate  number of tokens to generate greedily for the first row (optional)
    out       where to write the result, a safetensors file: `logits` [b, s, vocabulary] float32, `generated` [n]
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(case: dict[str, Any]) -> PreTrainedModel | peft.PeftModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        case["model"],
        dtype=torch.float32,
        attn_implementation="eager",  # the only one with soft-caps
        output_loading_info=True,
        local_files_only=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise SystemExit(f"{case['model']}: {problem}: {report[problem]}")
    if "adapter" in case:
        model = peft.PeftModel.from_pretrained(model, case["adapter"])
    return model.eval()


@torch.no_grad()
def run(case: dict[str, Any]) -> None:
    model = load(case)
    tokens = torch.tensor(case["tokens"])
    result = {"logits": model(tokens).logits.float().contiguous()}
    if "generate" in case:
        prompt = tokens[:1]
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case["generate"], do_sample=False
        )
        result["generated"] = answer[0, prompt.shape[1] :].contiguous()
    save_file(result, case["out"])


if __name__ == "__main__":
    torch.set_num_threads(2)
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(case)
