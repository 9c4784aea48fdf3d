"""How components are parts of others, as dimensions are of heads."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .groups import KINDS, Group


@dataclass
class Runs:
    """How components are parts of others, as dimensions are of heads.

    Args:
        whole (`Group`): The others.
        left (`list[int]`): Components that are left in each of them.
        of_kinds (`Mapping[str, list[int]]`): The same for all kinds that these consist of.
        narrows (`bool`): Whether the module around them works with as many of each kind as the widest of them has.
        marks (`list[str]`, *optional*): For components that stay at their places, as rotary pairs do in a head: for
            every place in each of the others, a "1" if its component is left, or else a "0".
    """

    whole: Group
    left: list[int]
    of_kinds: Mapping[str, list[int]]
    narrows: bool = False
    marks: list[str] | None = None

    def keep(self, positions: Sequence[int]) -> None:
        """Notes that only the components at some positions, in ascending order, are left."""
        owners = self.of_each()
        left = Counter(owners[position] for position in positions)
        if self.marks is not None:
            present = [place for place, mark in enumerate("".join(self.marks)) if mark == "1"]
            stay, size = {present[position] for position in positions}, len(self.marks[0])
            starts = range(0, size * len(self.marks), size)
            self.marks = ["".join("01"[start + i in stay] for i in range(size)) for start in starts]
        self.left = [left[part] for part in range(len(self.left))]

    def size_left(self, left: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """How many of the others are left, and as how wide the module around them works with them.

        Args:
            left (`Mapping[str, Sequence[int]]`): Components that are left in each of them, by kind.
        """
        (needed,) = (kind for name in left if (kind := KINDS[name].needs))
        alive = [place for place, count in enumerate(left[needed]) if count]
        if not (self.narrows and alive):
            return len(alive), self.whole.head_size
        return len(alive), max(counts[place] for counts in left.values() for place in alive)

    def of_each(self) -> list[int]:
        """For every component, the place of what it is a part of."""
        return [place for place, count in enumerate(self.left) for _ in range(count)]

    def places_left(self) -> set[int]:
        """Places of those that have components left."""
        return {place for place, count in enumerate(self.left) if count}


def marks_of(left: int | str, size: int) -> str:
    """Marks of the components of a part that stay at their places; a number is 0 for none or 1 for all of them."""
    return left if isinstance(left, str) else size * "01"[left > 0]
