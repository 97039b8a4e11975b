"""Batches of the Trainer by tokens: forward passes of so many, and as many for each process.

The optimiser step stays the same: the losses of the passes are shares of one mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

Batch = Mapping[str, Any]


def split_batch(inputs: Batch, tokens: int) -> list[dict[str, Any]]:
    """Divide a batch into parts of at most `tokens` tokens; a row, or the responses of a prompt,
    that has more is a part of its own.

    Args:
        inputs: rows one after the other, (1, N), whose `position_ids` restart; or right-padded rows
            with an `attention_mask`, (B, L), and with numbers of each row, (B,). Rows with the same
            number in `groups` stay together.
    """
    positions = inputs.get("position_ids")
    if positions is not None and len(positions) == 1:
        bounds = [*(positions[0] == 0).nonzero()[:, 0].tolist(), positions.shape[1]]
        sizes = [(1, end - start) for start, end in zip(bounds, bounds[1:], strict=False)]
        runs = together(sizes, tokens, padded=False)
        return [_between(inputs, bounds[first : last + 1]) for first, last in runs]
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    groups = inputs["groups"].tolist() if "groups" in inputs else [*range(len(lengths))]
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    # the longest first: less padding
    units = sorted(rows.values(), key=lambda unit: -max(lengths[row] for row in unit))
    sizes = [(len(unit), max(lengths[row] for row in unit)) for unit in units]
    parts = []
    for first, last in together(sizes, tokens, padded=True):
        chosen = [row for unit in units[first:last] for row in unit]
        width = sizes[first][1]
        parts.append(
            {n: x[chosen][:, :width] if x.dim() > 1 else x[chosen] for n, x in inputs.items()}
        )
    return parts


def _between(inputs: Batch, bounds: Sequence[int]) -> dict[str, Any]:
    """Cut out rows that follow one another; `bounds` are where each begins, and the end."""
    part = {name: x[:, bounds[0] : bounds[-1]] for name, x in inputs.items() if _per_token(x)}
    if "seq_idx" in part:  # TRL's, for state-space models
        part["seq_idx"] = part["seq_idx"] - part["seq_idx"][0, 0]
    if "cu_seq_lens_q" in inputs:  # TRL's, for attention
        starts = inputs["cu_seq_lens_q"].new_tensor([bound - bounds[0] for bound in bounds])
        longest = int(starts.diff().max())
        part |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        part |= {"max_length_q": longest, "max_length_k": longest}
    return part


def _per_token(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


def together(sizes: Sequence[tuple[int, int]], tokens: int, padded: bool) -> list[tuple[int, int]]:
    """Join neighbours while they have at most `tokens` tokens; return (first, last + 1) of each.

    Args:
        sizes: rows, and tokens of the longest one.
        padded: every row takes as much as the longest of its neighbours.
    """
    bounds, first = [], 0
    while first < len(sizes):
        last, rows, longest, total = first, 0, 0, 0
        while last < len(sizes):
            rows, longest = rows + sizes[last][0], max(longest, sizes[last][1])
            total += sizes[last][0] * sizes[last][1]
            if last > first and (rows * longest if padded else total) > tokens:
                break
            last += 1
        bounds.append((first, last))
        first = last
    return bounds


class SharedBatches(BatchSampler):
    """The batches of a sampler, whose rows the processes exchange within each step until all have
    similar numbers of tokens: in a step, each waits for the slowest.

    The last rows are shared too, and none is read twice. A process that gets no row of them gets
    the number of rows instead, as which `WithWeightlessRow` has a row that counts for nothing.
    """

    def __init__(self, batches: BatchSampler, lengths: Sequence[int], num_processes: int):
        """Take a sampler of the batches of all processes, and the tokens of each row."""
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self.lengths, self.num_processes = lengths, num_processes

    def __len__(self) -> int:
        return -(-super().__len__() // self.num_processes) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        batches = super().__iter__()
        while step := list(islice(batches, self.num_processes)):
            dealt = level([*chain(*step)], self.lengths, self.num_processes)
            yield from (rows or [len(self.lengths)] for rows in dealt)


def level(rows: Sequence[int], lengths: Sequence[int], num_batches: int) -> list[list[int]]:
    """Deal rows to batches that differ in size by one row at most: each, the longest first, to the
    batch with the fewest tokens that has room."""
    dealt: list[list[int]] = [[] for _ in range(num_batches)]
    each, rest = divmod(len(rows), num_batches)
    room, totals = [each + (i < rest) for i in range(num_batches)], [0] * num_batches
    for row in sorted(rows, key=lambda row: -lengths[row]):
        open_ones = (i for i in range(num_batches) if len(dealt[i]) < room[i])
        number = min(open_ones, key=totals.__getitem__)
        dealt[number].append(row)
        totals[number] += lengths[row]
    return dealt


class WithWeightlessRow(Dataset[Any]):
    """Rows, and after the last one another that adds nothing to the loss."""

    def __init__(self, rows: Any, weightless: dict[str, Any]):
        self.rows, self.weightless = rows, weightless

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.weightless if number == len(self.rows) else self.rows[number]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)  # `group_by_length` reads their lengths
