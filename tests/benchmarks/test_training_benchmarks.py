"""The training benchmarks: they compare the same training, and print the right numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.contest import OURS, ROOT, TORCHTUNE, ContenderFailed, run_once
from benchmarks.gpu import SHAPES, flops_per_token
from benchmarks.recipe import FP32_TOLERANCE, Material
from benchmarks.report import write_section
from tests.tiny_models import make_tiny_model


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(tmp_path, {"llama": make_tiny_model(tmp_path / "llama")})


def test_with_equal_settings_our_recipe_and_torchtunes_see_the_same_tokens_and_have_the_same_losses(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = material.task("llama", "lora", equal=True, steps=4)
    ours, stock = run_once(OURS, task), run_once(TORCHTUNE, task)
    assert ours.tokens == stock.tokens
    assert len(set(ours.tokens)) > 1, "rows of one length can't tell orders apart"
    assert ours.losses == pytest.approx(stock.losses, abs=FP32_TOLERANCE)
    assert ours.started < ours.marks["imported"] < ours.marks["loaded"] < ours.ends[0] < ours.ends[-1]


def test_a_contender_that_fails_says_why(material: Material, tmp_path: Path) -> None:
    task = material.task("llama", "full", equal=True, steps=1)
    (tmp_path / "llama" / "model.safetensors").unlink()
    with pytest.raises(ContenderFailed, match=r"model\.safetensors"):
        run_once(OURS, task)


def test_one_measurement_on_a_gpu_that_takes_too_long_is_not_the_end_of_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny"])
    monkeypatch.setattr(gpu, "TIMEOUT_S", 0.01)
    assert gpu.main() == 1
    table = capsys.readouterr().out
    assert table.count("| failed |") == 4
    assert "not done after 0 s" in table


def test_the_gpu_benchmark_runs_ours_and_torchtunes_recipe_on_random_weights() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ")[:3] for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert rows == [["| tiny", method, contender] for method in ("lora", "full") for contender in ("ours", "torchtune")]


def test_flops_of_a_token_are_those_of_the_papers_formula() -> None:
    """Llama 3.1 8B has 8.03 billion parameters, 0.53 billion of them in its embedding."""
    in_products = 8_030_261_248 - 128_256 * 4096
    assert flops_per_token(SHAPES["8b"], 8_030_261_248, 0) == pytest.approx(6 * in_products, rel=1e-3)
    assert flops_per_token(SHAPES["8b"], 6_800_000, 0) == pytest.approx(4 * in_products, rel=3e-3)
    attention = flops_per_token(SHAPES["8b"], 0, 1000) - flops_per_token(SHAPES["8b"], 0, 0)
    assert attention == 12 * 32 * 4096 * 500


def test_a_section_of_the_table_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    file.write_text(
        "# Title\n<!-- a: begin -->\nold\n<!-- a: end -->\nbetween\n<!-- b: begin -->\nkept\n<!-- b: end -->\n"
    )
    write_section("a", "new", file)
    text = file.read_text()
    assert "old" not in text
    assert "\nnew\n" in text
    assert "between" in text
    assert "kept" in text
    with pytest.raises(ValueError, match="no section c"):
        write_section("c", "new", file)
