"""A cache whose rows are written at places of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opt_torch.cache import KVCache


@dataclass(frozen=True, repr=False)
class RowsCache(KVCache):
    """A cache whose rows are written at places of their own, one token each.

    Attributes:
        places: (B,) the slot of each row's new token.
    """

    places: Tensor | None = None

    def write(self, layer: int, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values.

        Returns:
            Keys and values of the layer, (B, H, length + 1, K) each.
        """
        assert self.places is not None
        rows = torch.arange(len(self.places), device=self.places.device)
        for buffer, new in ((self.keys[layer], key_BHTK), (self.values[layer], value_BHTK)):
            buffer[rows, :, self.places] = new[:, :, 0]
        seen = slice(0, self.length + 1)
        return self.keys[layer][:, :, seen], self.values[layer][:, :, seen]
