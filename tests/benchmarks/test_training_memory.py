"""The estimate of a worker's memory against a measurement by the kernel. (benchmarks/training.md has more cases.)"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.training_memory import CASES, estimated, measured
from trainers.planning.memory import TOLERANCE

SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}
"""37 million parameters, so that the libraries' own memory matters little. Like that of any real model, the embedding
is larger than what glibc keeps on its heap when it is freed (32 MiB at most). With a smaller one, and two workers that
exchange it in threads, resident memory would vary by a quarter between runs."""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize(
    "name",
    ["full, fp32", "full, fp32, checkpointing", "full, fp32, 2 workers", "LoRA, fp32", "DoRA, fp32", "full, bf16"],
)
def test_the_estimate_is_what_a_worker_needs_at_its_peak(name: str, tmp_path: Path) -> None:
    case = replace(CASES[name], shape=SHAPE, row_tokens=32 if "bf16" in name else 256)
    peak = measured(case, tmp_path)["peak"]
    assert estimated(case, tmp_path).peak_bytes == pytest.approx(peak, rel=TOLERANCE)
