"""Scoring elsewhere while this process samples: responses that have ended need not wait for others.

Only scorers that another process computes: remote ones, and judges behind an endpoint. The groups
in which they are asked follow from the responses alone, so that equal runs ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

from rlhf.scorers.call import Scores


class ScoresInTheBackground:
    """Asks for the scores of each `group_size` rows that are added, in threads of its own.

    Add rows inside its context: an error there ends what is under way.
    """

    def __init__(
        self,
        score: Callable[[Sequence[int], Sequence[list[int]]], Callable[[], Scores]],
        group_size: int,
        num_threads: int,
    ):
        """Prepare to score.

        Args:
            score: rows and their ids -> a function that scores them, which a thread calls.
        """
        self.score, self.group_size = score, group_size
        self.pool = ThreadPoolExecutor(num_threads)
        self.waiting: dict[int, list[int]] = {}
        self.groups: list[tuple[list[int], Future[Scores | None]]] = []
        self.failure: BaseException | None = None  # after one, no further group is asked about

    def __enter__(self) -> ScoresInTheBackground:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def add(self, row: int, ids: list[int]) -> None:
        """Take a row; a full group is asked about at once."""
        self.waiting[row] = ids
        if len(self.waiting) == self.group_size:
            self._ask()

    def _ask(self) -> None:
        group, self.waiting = self.waiting, {}
        task = self.score([*group], [*group.values()])
        self.groups.append(([*group], self.pool.submit(self._run, task)))

    def _run(self, task: Callable[[], Scores]) -> Scores | None:
        try:
            return None if self.failure else task()
        except BaseException as error:
            self.failure = error
            raise

    def result(self) -> Scores:
        """The scores of all rows that were added, in the order of their numbers.

        Raises:
            InputError: that of the first group that failed.
        """
        if self.waiting:
            self._ask()
        wait([future for _, future in self.groups], return_when=FIRST_EXCEPTION)
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.failure is not None:
            raise self.failure
        found = [part for _, future in self.groups if (part := future.result()) is not None]
        rows = torch.tensor([row for group, _ in self.groups for row in group])
        order = rows.argsort()
        names = found[0].components
        return Scores(
            torch.cat([part.total for part in found])[order],
            components={n: torch.cat([p.components[n] for p in found])[order] for n in names},
        )
