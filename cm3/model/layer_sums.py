"""The sum of A^l x over the layers l = 0..L of a user-item graph and its gradient, given or wanted for all users or some.

Users have neighbours among items only, and items among users. On the CPU the two kinds of rows are computed one after the
other, those of users in the memory of one table (`Sides`); elsewhere one product has both (`Joint`), which launches fewer
kernels. Both give the same numbers.
"""

import functools
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cm3.model.graph import Entries, SparseMatrix, add_rows, sum_of_layers
from cm3.model.unit_rows import UnitRows


class LayerSums(ABC):
    """The sum for some columns of x at a time, whose rows are the U users, of unit norm, and the I items.

    Args:
        adjacency: A, symmetric, (U + I, U + I).
        layers: L.
        n_users: U.
        ids: (n,) users whose rows are returned, and given to the gradient; repetitions are allowed. None: all.
    """

    def __init__(self, adjacency: SparseMatrix, layers: int, n_users: int, ids: Tensor | None) -> None:
        self.adjacency, self.layers, self.n_users, self.ids = adjacency, layers, n_users, ids

    @abstractmethod
    def forward(self, users: UnitRows, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of users (U or n, d') and items (I, d'), new tables, given x."""

    @abstractmethod
    def backward(self, by_user: Tensor, by_item: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in x of users (U, d') and items (I, d'), given those in the sums; the latter in a new table.

        `room` (U, d') is memory that may be used for the former.
        """


class Joint(LayerSums):
    """Both kinds of rows in one table."""

    def forward(self, users: UnitRows, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums."""
        x = torch.cat([users.table(), items])
        if self.ids is None:
            return self._parts(sum_of_layers(self.adjacency, x, self.layers))
        by_user, by_item, y = x[self.ids], x[self.n_users :].clone(), x
        for _ in range(self.layers):
            y = self.adjacency.product(y)
            by_user += y[self.ids]
            by_item += y[self.n_users :]
        return by_user, by_item

    def backward(self, by_user: Tensor, by_item: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient."""
        if self.ids is None:
            return self._parts(sum_of_layers(self.adjacency, torch.cat([by_user, by_item]), self.layers))
        grad = by_user.new_zeros(self.n_users + len(by_item), by_user.shape[1])
        for layer in range(self.layers + 1):
            if layer:
                grad = self.adjacency.product(grad)
            grad[: self.n_users].index_add_(0, self.ids, by_user)
            grad[self.n_users :] += by_item
        return self._parts(grad)

    def _parts(self, table: Tensor) -> tuple[Tensor, Tensor]:
        return table[: self.n_users], table[self.n_users :]


class Sides(LayerSums):
    """Users and items in tables of their own, on the CPU.

    Where few users are wanted, the last product of the sum leaves out the rows of the others, and the first one of the
    gradient their columns, where it is 0; the order of each sum stays.
    """

    def forward(self, users: UnitRows, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums."""
        of_users, of_items = self._sides
        x = items.contiguous()
        y, z = users.table(), x
        if self.ids is None:
            for _ in range(self.layers):
                above = of_items.product(y).add_(x)
                users.add_to(of_users.product_into(y, z))
                z = above
            return y, z if self.layers else x.clone()
        by_user, by_item = y.index_select(0, self.ids), x.clone()
        for layer in range(1, self.layers + 1):
            above = of_items.product(y)
            if layer == self.layers and self._few:
                by_user += of_users.rows(self.ids).product(z)
            else:
                by_user += of_users.product_into(y, z).index_select(0, self.ids)
            z = above
            by_item += z
        return by_user, by_item

    def backward(self, by_user: Tensor, by_item: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient."""
        of_users, of_items = self._sides
        if self.ids is None:
            y, z = by_user, by_item.contiguous()
            for _ in range(self.layers):
                above = of_items.product_into(torch.empty_like(z), y).add_(by_item)
                y = of_users.product_into(room, z).add_(by_user)
                z = above
            return y, z if self.layers else z.clone()
        first = self._read if self._few else of_items  # before `room` takes memory
        y = add_rows(room.zero_(), self.ids, by_user)
        z = by_item + 0.0  # no negative zeros, as in a table of zeros to which it is added
        for layer in range(1, self.layers + 1):
            above = (first if layer == 1 else of_items).product_into(torch.empty_like(z), y).add_(by_item)
            add_rows(of_users.product_into(y, z), self.ids, by_user)
            z = above
        return y, z

    @property
    def _few(self) -> bool:
        return self.ids is not None and 2 * len(self.ids) <= self.n_users

    @functools.cached_property
    def _sides(self) -> tuple[Entries, Entries]:
        return self.adjacency.sides(self.n_users)

    @functools.cached_property
    def _read(self) -> Entries:
        """The items' rows with 0 in the columns of users that are not wanted."""
        wanted = torch.zeros(self.n_users, dtype=torch.bool)
        wanted[self.ids] = True
        return self._sides[1].with_columns(wanted)
