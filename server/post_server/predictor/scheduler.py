"""The texts that are gone on with, of all models and requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from post_server.predictor.continuous_batching import ContinuousBatch
from post_server.predictor.failures import as_post_error
from post_server.predictor.model_cache import ReadyModel
from post_server.predictor.requests import GenerationRequest
from post_shared.errors import InvalidInput, PostError, Timeout

_NO_NUMBERS = InvalidInput("the model's answers are no numbers; the prompt's may be far too large: tune it again")


@dataclass(eq=False)
class _Place:
    """One model, and what is being written with it."""

    ready: ReadyModel
    writing: ContinuousBatch
    orders: list[GenerationRequest] = field(default_factory=list)


class Scheduler:
    """Orders by model. A model stays in memory as long as one of its texts is under way."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def __len__(self) -> int:
        """Texts that wait or are under way."""
        return sum(len(place.writing) for place in self._places.values())

    @property
    def orders(self) -> list[GenerationRequest]:
        return [order for place in self._places.values() for order in place.orders]

    def add(self, ready: ReadyModel, order: GenerationRequest) -> None:
        """
        Raises:
            InvalidInput: the model can't generate.
        """
        place = self._places.get(ready.row.id) or _Place(ready, ContinuousBatch(ready.model))
        self._places[ready.row.id] = place
        place.orders.append(order)
        place.writing.add(order.texts)

    def drop(self, orders: Collection[GenerationRequest]) -> None:
        """Write no more of these."""
        for place in self._places.values():
            place.writing.drop([text for order in place.orders if order in orders for text in order.texts])
            place.orders = [order for order in place.orders if order not in orders]
        self._places = {name: place for name, place in self._places.items() if place.orders}

    def step(self, now: float) -> Iterator[tuple[GenerationRequest, PostError | None]]:
        """One token for every text under way. Every order, and what has ended it before its end, if anything has."""
        late = [order for order in self.orders if order.deadline <= now]
        self.drop(late)
        for order in late:
            yield order, Timeout("the time for this request is over; ask for less at once, or try again later")
        for place in list(self._places.values()):
            try:
                place.writing.step()
            except Exception as error:
                failed, known = list(place.orders), as_post_error(error)
                self.drop(failed)
                for order in failed:
                    yield order, known
                continue
            orders = list(place.orders)
            self.drop([order for order in orders if order.ended or any(text.row.broken for text in order.texts)])
            for order in orders:
                yield order, _NO_NUMBERS if any(text.row.broken for text in order.texts) else None
