"""Held-out parts of the training split, on which settings are chosen."""

from collections.abc import Sequence

from .settings import Setting


def split_fold(texts: Sequence[str], setting: Setting) -> tuple[Sequence[int], Sequence[int]]:
    """Splits a task's training examples into those of a fold.

    Args:
        texts (`Sequence[str]`): The first text of each training example.
        setting (`Setting`): How the task is trained.

    Returns:
        `tuple`: The positions of the examples to train on, and of those held out.
    """
    held_out = setting.held_out or len(texts) // 5
    if setting.fold_words is None:
        return range(held_out, len(texts)), range(held_out)
    padded = [f" {' '.join(text.split())} " for text in texts]  # Spaces, so that only whole words match.
    long = [i for i, text in enumerate(padded) if len(text.split()) >= setting.fold_words][:held_out]
    held_texts = [padded[i] for i in long]
    joined = "|".join(held_texts)
    kept = [i for i, text in enumerate(padded) if text not in joined and not any(t in text for t in held_texts)]
    return kept, long
