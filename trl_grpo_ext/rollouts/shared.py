"""Conversations with one history: which rows each of them fills, and how far each has come."""

from dataclasses import dataclass

from .dialogue import Dialogue


@dataclass
class Thread:
    """
    A conversation that is carried on with one answer of each turn, and the rows that its answers fill.

    Args:
        number (`int`):
            Position among this process's conversations.
        first (`int`):
            This process's row of the first answer.
        sizes (`list[int]`):
            Answers of each turn.
        fresh ([`Dialogue`]):
            The conversation before its first answer.
        waiting ([`Dialogue`]):
            The conversation as it waits for its next answers.
        parent (`int`, *optional*):
            Row of the answer that was carried on, `None` where the conversation begins.
    """

    number: int
    first: int
    sizes: list[int]
    fresh: Dialogue
    waiting: Dialogue
    parent: int | None = None

    def row_of(self, step: int) -> int:
        """This process's row of the first answer that is sampled in a step."""
        return self.first + sum(self.sizes[:step])

    def go_on(self, following: Dialogue | None, chosen: int) -> None:
        """Wait with `following`, which carries on the answer in the row `chosen`. Begin again where it is `None`."""
        # The number of rows is fixed, so a conversation that ended early fills the rest with its first turns.
        self.waiting = self.fresh if following is None else following
        self.parent = None if following is None else chosen


def fill_with_conversations(
    turns: list[int], num_rows: int, group_size: int, num_processes: int
) -> list[list[tuple[int, list[int]]]]:
    """
    Which conversations each process takes, and how large the groups of their turns are, so that all rows are filled.

    A conversation lies on one process. Each process takes the first candidates that still fit with `group_size` rows
    a turn. Rows that are left over make the first groups larger.

    Args:
        turns (`list[int]`):
            Turns of each candidate, in the order of their draw; no more than `num_rows // group_size`.
        num_rows (`int`):
            Rows of one process.
        group_size (`int`):
            Fewest answers of a turn.
        num_processes (`int`):
            Number of processes.

    Returns:
        `list[list[tuple[int, list[int]]]]`:
            For each process, positions among the candidates with the group sizes of their turns.

    Raises:
        `ValueError`: when there are too few candidates.

    Example:

    ```python
    >>> fill_with_conversations([3, 2, 1], num_rows=16, group_size=4, num_processes=1)
    [[(0, [4, 4, 4]), (2, [4])]]
    >>> fill_with_conversations([2, 3], num_rows=14, group_size=4, num_processes=2)
    [[(0, [7, 7])], [(1, [5, 5, 4])]]

    ```
    """
    left = list(range(len(turns)))
    chosen = []
    for _ in range(num_processes):
        room = num_rows // group_size
        own = []
        for position in list(left):
            if turns[position] <= room:
                own.append(position)
                left.remove(position)
                room -= turns[position]
        if not own:
            raise ValueError(
                f"{len(turns)} conversations do not suffice for {num_processes} processes, each of which needs one: "
                "add conversations to the dataset"
            )
        groups = sum(turns[position] for position in own)
        sizes = iter([num_rows // groups + (i < num_rows % groups) for i in range(groups)])
        chosen.append([(position, [next(sizes) for _ in range(turns[position])]) for position in own])
    return chosen
