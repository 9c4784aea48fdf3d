"""A model folder and data files, as users give them to scripts and commands."""

from pathlib import Path

from tiny import make_model
from transformers import BertTokenizerFast


WORDS = [*"abcdefghijklmnopqrstuvwxyz", "good", "bad", "film", "plot"]
ROWS = [("good film", "yes"), ("bad plot", "no"), ("good plot", "yes"), ("bad film", "no")] * 8


def save_model(folder: Path) -> Path:
    """Saves a tiny BERT with its tokenizer below a folder, and returns where."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    folder = folder / "model"
    BertTokenizerFast(vocab_file=str(vocabulary), vocab=str(vocabulary)).save_pretrained(folder)
    model = make_model(vocab_size=40)
    model.float().base_model.save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: list[tuple[str, str]]) -> str:
    """Writes sentences and labels, and returns the path."""
    path.write_text("\n".join(["sentence,label", *(f"{text},{label}" for text, label in rows)]))
    return str(path)


def flags(tmp_path, model_dir, *more):
    """Flags of a short run of `run_glue_hap.py` on the CPU."""
    short = ["--model_name_or_path", str(model_dir), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    return [*short, "--disable_tqdm", "True", "--num_train_epochs", "1", *more]


def own_files(tmp_path):
    """Writes a training and a validation file, and returns their flags."""
    files = [write_csv(tmp_path / f"{split}.csv", ROWS) for split in ("train", "validation")]
    return ["--train_file", files[0], "--validation_file", files[1]]
