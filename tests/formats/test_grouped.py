"""What formats with groups share: where groups end, and codes back in the order of columns."""

import torch

from aptq.api import Option
from aptq.formats.grouped import by_output, split_groups


def test_the_last_group_may_be_shorter_and_one_that_is_wider_is_the_row() -> None:
    row = torch.arange(10)
    assert [len(part) for part in split_groups(row, Option(4, 4))] == [4, 4, 2]
    for size in (-1, 10, 64):
        assert [part.tolist() for part in split_groups(row, Option(4, size))] == [row.tolist()]


def test_codes_of_columns_in_any_order_come_back_by_output() -> None:
    generator = torch.Generator().manual_seed(0)
    natural = torch.randint(0, 70000, (2, 5, 3), generator=generator)  # [heads, in, rows]
    order = torch.stack([torch.randperm(5, generator=generator) for _ in range(2)])
    met = torch.stack([head[by] for head, by in zip(natural, order, strict=True)])
    assert torch.equal(by_output(met, order), natural.transpose(1, 2).reshape(6, 5))
