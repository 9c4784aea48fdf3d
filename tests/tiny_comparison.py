"""A comparison of `glue_scripts.compare_glue` that takes seconds."""

from datasets import ClassLabel, Dataset
from script_inputs import ROWS

from glue_scripts.compare_glue.base_models import BASE_MODELS, MINILM, BaseModel
from glue_scripts.compare_glue.settings import SETTINGS, Setting


def make_tiny(folder, model_dir, patch):
    """Flags for a task of a few sentences and a tiny model."""
    rows = {"sentence": [text for text, _ in ROWS], "label": [int(label == "yes") for _, label in ROWS]}
    (folder / "sst2").mkdir()
    features = Dataset.from_dict(rows).features
    features["label"] = ClassLabel(names=["negative", "positive"])
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(folder / "sst2" / f"{split}.parquet")
    patch.setitem(BASE_MODELS, MINILM, BaseModel(lambda cache: model_dir, 1e-4))
    patch.setitem(SETTINGS, "sst2", Setting(16, 1, held_out=8))
    folders = ["--data_dir", str(folder), "--output_dir", str(folder / "out")]
    return [*folders, "--tasks", "sst2", "--seeds", "0", "--ratios", "0.5", "--recovery_steps", "2"]
