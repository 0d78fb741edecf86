"""Deferred packages: the recipe's import leaves them out, and they are complete once they are used."""

import subprocess
import sys
from pathlib import Path


def run(code: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_recipe_does_not_import_what_it_does_not_use() -> None:
    needless = {"pandas", "datasets", "torchao.quantization", "torchtune.datasets", "torchtune.models.llama3"}
    assert run(f"import sys, trainers.training.recipe; print(sorted({needless!r} & sys.modules.keys()))") == "[]"


def test_a_deferred_package_is_complete_once_an_attribute_is_looked_up() -> None:
    code = """
import trainers.training.recipe, torchtune, torchtune.training
from torchao import quantize_
print(torchtune.__version__[:5], torchtune.datasets.__name__, torchtune.training.get_lr.__name__, quantize_.__name__)
"""
    assert run(code) == "0.6.1 torchtune.datasets get_lr quantize_"


def test_packages_that_import_each_other_in_a_circle_can_be_deferred() -> None:
    code = "import trainers.training.recipe; from torchao.dtypes import AffineQuantizedTensor as it; print(it.__name__)"
    assert run(code) == "AffineQuantizedTensor"


def test_a_deferred_package_has_no_names_but_its_own() -> None:
    code = "import trainers, torchtune; print(hasattr(torchtune, 'nothing'), hasattr(torchtune, '__wrapped__'))"
    assert run(code) == "False False"


def test_a_package_whose_init_fails_fails_again_with_its_own_error(tmp_path: Path) -> None:
    code = f"""
import sys, trainers.deferred as deferred
from pathlib import Path
folder = Path({str(tmp_path)!r}, "torchtune")
folder.mkdir()
(folder / "__init__.py").write_text("import nothing_of_that_name")
sys.path.insert(0, {str(tmp_path)!r})
import torchtune
for _ in range(2):
    try:
        torchtune.anything
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert run(code) == "nothing_of_that_name"
