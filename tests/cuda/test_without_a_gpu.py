"""Tests of the code for GPUs on a machine without one: `make test-cuda`. They test all but the numbers, see stand_in.c.

Not part of CI: torch for CUDA is a download of 3 GB.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.planning.memory import TOLERANCE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
H200, A100, L4, RTX_5090 = "90", "80", "89", "120"
WIDER = {"hidden_size": 256, "intermediate_size": 512}

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or shutil.which("gcc") is None,
    reason="needs torch built for CUDA, gcc, and no GPU",
)


class StandIn:
    """Runs programs where the stand-in is the only GPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        headers = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"
        library = folder / "libcuda.so.1"
        build = ["gcc", "-shared", "-fPIC", f"-I{headers}", "-o", str(library), str(HERE / "stand_in.c")]
        subprocess.run(build, check=True, timeout=60)
        (folder / "libcuda.so").symlink_to(library)

    def run(self, module: str, *arguments: str, capability: str = H200) -> str:
        """The output of the program."""
        env = os.environ | {
            "STAND_IN": capability,
            "LD_PRELOAD": str(self._folder / "libcuda.so.1"),
            "LD_LIBRARY_PATH": str(self._folder),
            "TRITON_LIBCUDA_PATH": str(self._folder),
            "TORCHINDUCTOR_CACHE_DIR": str(self._folder / capability),
            "TRITON_CACHE_DIR": str(self._folder / capability / "triton"),
        }
        command = [sys.executable, "-m", module, *arguments]
        ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
        return ended.stdout

    def dry_run(self, what: str, *, capability: str = H200, **arguments: Any) -> Any:
        printed = self.run("tests.cuda.dry_run", what, json.dumps(arguments), capability=capability)
        return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(tmp_path_factory.mktemp("stand-in"))


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        ("llama", "lora", {}),
        ("llama", "full", {}),
        ("llama", "full", {"changes": {"dtype": "bf16"}}),
        ("llama", "full", {"changes": {"dtype": "fp32", "clip_grad_norm": 1.0}}),
        ("llama", "full", {"changes": {"optimizer": "torch.optim.SGD", "gradient_accumulation_steps": 2}}),
        ("llama", "lora", {"changes": {"optimizer": "torchao.optim.AdamW8bit"}}),
        ("llama", "lora", {"changes": {"enable_activation_checkpointing": True, "compile": True}}),
        ("qwen3", "full", {"changes": {"compile": True}}),
        ("llama", "lora", {"changes": {"lora": {"dropout": 0.1}}}),
        ("mistral", "lora", {"changes": {"lora": {"mlp": True, "output": True}}}),
        ("llama", "lora", {"pairs": True}),
        ("llama", "full", {"pairs": True}),
        ("llama", "dora", {}),
        ("llama", "qlora", WIDER),
        ("llama", "qat", {"changes": {"dtype": "fp32"}}),
        ("gemma2", "full", {}),
        ("gemma3_text", "lora", {}),
        ("phi3", "lora", {}),
    ],
)
def test_a_job_trains_stops_and_goes_on_and_no_step_waits_for_the_gpu(
    stand_in: StandIn, family: str, method: str, more: dict[str, Any]
) -> None:
    more = {"changes": {}} | more
    part, rest = stand_in.dry_run("train", family=family, method=method, **more)
    assert len(part) == 1
    assert rest


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("lora", {"enable_activation_checkpointing": True}),
        ("qlora", {}),
        ("full", {}),
    ],
)
def test_a_gpu_needs_the_memory_that_the_estimate_says(stand_in: StandIn, method: str, changes: dict[str, Any]) -> None:
    found = stand_in.dry_run("memory", method=method, changes=changes)
    assert found["counted"] == pytest.approx(found["estimated"], rel=TOLERANCE)


@pytest.mark.parametrize("capability", [A100, L4, H200, RTX_5090])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "window", "softcap"),
    [
        (64, "bfloat16", None, None),
        (96, "bfloat16", 1000, None),
        (128, "bfloat16", None, None),
        (256, "bfloat16", 1000, 50.0),
        (64, "float32", None, None),
        (128, "float32", None, None),
    ],
)
def test_flex_attention_is_used_where_its_kernels_fit_into_a_gpus_shared_memory(
    stand_in: StandIn, capability: str, head_dim: int, dtype: str, window: int | None, softcap: float | None
) -> None:
    found = stand_in.dry_run(
        "flex", capability=capability, head_dim=head_dim, dtype=dtype, window=window, softcap=softcap
    )
    assert found["used"] == (found["taken"] <= found["there"]), found


def test_the_benchmark_for_gpus_measures_both_contenders(stand_in: StandIn) -> None:
    table = stand_in.run("benchmarks.gpu", "--tiny", "--steps", "2")
    assert [line.split("|")[3].strip() for line in table.splitlines() if line.startswith("| tiny")] == [
        *("ours", "torchtune", "ours", "torchtune")
    ]
