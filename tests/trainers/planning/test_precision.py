"""The default data type: mixed if the device computes in bf16, else fp32."""

from pathlib import Path

import pytest
import torch

from tests.trainers.recipe_support import make_plan_for
from trainers.planning.precision import default_dtype, has_bf16
from trainers.training import training_model
from trainers.training.distributed import Ranks
from trainers.training.training_model import choose_dtype

CPU = torch.device("cpu")


class Meeting(Ranks):
    """One of two ranks, of which `rank` many would train in mixed."""

    def sum(self, values: object) -> list[float]:
        return [self.rank]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx2 avx512f avx512_vnni avx512_bf16", True),
        ("fma avx2 avx512f amx_bf16 amx_tile amx_int8", True),
        ("fma avx2 avx512f avx512bw avx512_vnni", False),
        ("", False),
    ],
)
def test_a_processor_has_bf16_if_linux_lists_an_instruction_for_it(tmp_path: Path, flags: str, expected: bool) -> None:
    one = f"processor\t: 0\nmodel name\t: any\nflags\t\t: {flags}\nbugs\t\t: avx512_bf16\n\n"
    (tmp_path / "cpuinfo").write_text(one * 2)
    assert has_bf16(tmp_path / "cpuinfo") is expected


def test_without_a_description_of_the_processor_the_default_is_fp32(tmp_path: Path) -> None:
    assert not has_bf16(tmp_path / "cpuinfo")


def test_mixed_is_the_default_if_the_device_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr("trainers.planning.precision.has_bf16", lambda _, has=has: has)
        assert default_dtype("cpu") == ("mixed" if has else "fp32")
        assert default_dtype("cuda") == "mixed"


def test_the_plan_s_dtype_comes_first_then_that_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_model, "default_dtype", lambda _: "mixed")
    alone = Ranks(0, 1, CPU)
    assert choose_dtype(make_plan_for(dtype="fp32"), alone, "bf16") == "fp32"
    assert choose_dtype(make_plan_for(dtype=None), alone, "bf16") == "bf16"
    assert choose_dtype(make_plan_for(dtype=None), alone) == "mixed"


def test_workers_train_in_mixed_only_if_it_suits_the_machine_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_model, "default_dtype", lambda _: "mixed")
    plan = make_plan_for(dtype=None)
    assert choose_dtype(plan, Meeting(1, 2, CPU)) == "fp32"
    assert choose_dtype(plan, Meeting(2, 2, CPU)) == "mixed"
