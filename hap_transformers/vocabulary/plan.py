"""`VocabularyPlan`: which tokens stay, as data."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import read_json, write_text


@dataclass(repr=False)
class VocabularyPlan:
    """Which tokens of a vocabulary stay. A plan is data: save it, read it, look up what went.

    Args:
        kept (`list[int]`): The ids that stay, ascending, as they are numbered before trimming. The new id of a token
            is its position in this list. So the order of ids stays.
        size (`int`): Number of ids before trimming: rows of the model's input embeddings.
        kind (`str`): The kind of tokenizer: `"WordPiece"`, `"BPE"` or `"Unigram"`.
        model_type (`str`): The `config.model_type` the plan was made for.
        vocabulary (`str`): Digest of the tokens and ids the plan was made for.
        counts (`dict[str, int]`, *optional*): What the texts have: `"texts"`, `"tokens"`, how many of these are
            `"unknown"`, and how many different ones are `"used"` often enough.
        parameters (`dict[str, int]`, *optional*): Parameters of the whole model, `"before"` and `"after"`.
    """

    kept: list[int]
    size: int
    kind: str
    model_type: str
    vocabulary: str
    counts: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        ascending = all(before < after for before, after in zip(self.kept, self.kept[1:], strict=False))
        if not self.kept or not ascending or self.kept[0] < 0 or self.kept[-1] >= self.size:
            raise ValueError(
                f"The ids that a vocabulary plan keeps must be ascending, each once, from 0 to {self.size - 1}."
            )

    def __repr__(self) -> str:
        """What stays in numbers; the ids themselves are thousands."""
        counts = "".join(f", {name}={count:,}" for name, count in self.counts.items())
        fewer = "{before:,} -> {after:,}".format(**self.parameters) if self.parameters else "unknown"
        return (
            f"VocabularyPlan(keeps {len(self.kept):,} of {self.size:,} ids; kind='{self.kind}', "
            f"model_type='{self.model_type}'{counts}, parameters {fewer})"
        )

    def summary(self) -> dict[str, int]:
        """What the card and the page report: the `counts`, and how many tokens are `"kept"`."""
        return self.counts | {"kept": len(self.kept)}

    @property
    def new_ids(self) -> dict[int, int]:
        """The new id of every id that stays."""
        return {old: new for new, old in enumerate(self.kept)}

    def renumber(self, ids: Sequence[int]) -> list[int]:
        """The new ids of a text, or of labels, that were tokenized before trimming. Negative ones stay, such as -100.

        Raises:
            ValueError: If one of the tokens is gone.
        """
        new_ids = self.new_ids
        if gone := sorted({token for token in ids if token >= 0} - new_ids.keys()):
            raise ValueError(
                f"The ids {gone[:10]} are gone from the vocabulary. Tokenize the text anew, or name them in `keep` "
                "when trimming."
            )
        return [new_ids.get(token, token) for token in ids]

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "VocabularyPlan":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a vocabulary plan.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No vocabulary plan at '{path}'; `VocabularyPlan.save` writes one.")
        try:
            plan = cls(**read_json(path))
            if any(type(number) is not int for number in (plan.size, *plan.kept)):
                raise TypeError("size and kept must be whole numbers")
            return plan
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a vocabulary plan: {error!r}") from error
