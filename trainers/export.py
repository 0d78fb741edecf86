"""A trained model as a directory that loads anywhere."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainers.data.chat import template_to_save
from trainers.models.architecture import Architecture
from trainers.models.export_files import write_text
from trainers.models.weights import save_hf_model


def export_model(weights: Mapping[str, Tensor], arch: Architecture, model_dir: Path, out_dir: Path) -> None:
    """Writes everything inference needs: `weights`, and the rest from `model_dir`; where that has no chat template, the
    one that was trained with."""
    save_hf_model(weights, arch, model_dir, out_dir)
    template = template_to_save(model_dir)
    if template is not None:
        write_text(template, out_dir / "chat_template.jinja")
