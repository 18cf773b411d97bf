"""Batches for this rank's branches, exchanged within the mesh if branches are distributed over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from bandsplit.data.loader import Batch
from bandsplit.distributed.exchange import Exchange, Transfer
from bandsplit.distributed.mesh import Mesh


class BatchFeed:
    """Batches for this rank's branches; with several branch groups, of the images of all ranks of the replica.

    With several branch groups, the next batch is prepared and sent while the device computes on the current one.
    """

    def __init__(self, batches: Iterable[Batch], mesh: Mesh) -> None:
        self._batches = iter(batches)
        self._exchange = Exchange(mesh) if mesh.branch_groups > 1 else None
        self._under_way: Transfer | None = None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next(ahead=True)) is not None:
            yield batch

    def take(self, count: int, ahead: bool) -> list[Batch]:
        """The next `count` batches; with `ahead`, one more is prepared and sent, which advances the streams by one."""
        batches = [self._next(ahead or n + 1 < count) for n in range(count)]
        return [batch for batch in batches if batch is not None]

    def of_own_images(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (own branches, B, classes) and labels of a batch -> (all branches, B', classes), labels (B',).

        B' counts the images that this rank has decoded.
        """
        return (logits, labels) if self._exchange is None else self._exchange.give_back(logits, labels)

    def _next(self, ahead: bool) -> Batch | None:
        if self._exchange is None:
            return next(self._batches, None)
        transfer = self._under_way or self._send(self._exchange)
        self._under_way = self._send(self._exchange) if ahead and transfer else None
        if transfer is None:
            return None
        inputs, targets = transfer.wait()
        return Batch(inputs, *targets)

    def _send(self, exchange: Exchange) -> Transfer | None:
        with exchange.on_side_stream():
            batch = next(self._batches, None)
            return exchange.send(batch.inputs, batch.targets) if batch else None
