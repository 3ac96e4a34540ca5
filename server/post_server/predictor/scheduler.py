"""Schedules generation for all models and requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from post_server.predictor.continuous_batching import ContinuousBatch
from post_server.predictor.failures import NOT_FINITE, as_post_error
from post_server.predictor.model_cache import LoadedModel
from post_server.predictor.requests import GenerationRequest
from post_shared.errors import PostError, Timeout


@dataclass(eq=False)
class _ModelQueue:
    """One model, its requests and the batch that generates their texts."""

    loaded: LoadedModel
    batch: ContinuousBatch
    requests: list[GenerationRequest] = field(default_factory=list)


class Scheduler:
    """Requests by model. A model stays in memory as long as one of its texts is being generated."""

    def __init__(self) -> None:
        self._queues: dict[str, _ModelQueue] = {}

    def __len__(self) -> int:
        """Number of texts that wait or are being generated."""
        return sum(len(queue.batch) for queue in self._queues.values())

    @property
    def requests(self) -> list[GenerationRequest]:
        return [request for queue in self._queues.values() for request in queue.requests]

    def add(self, loaded: LoadedModel, request: GenerationRequest) -> None:
        """
        Raises:
            InvalidInput: the model can't generate.
        """
        queue = self._queues.get(loaded.row.id) or _ModelQueue(loaded, ContinuousBatch(loaded.model))
        self._queues[loaded.row.id] = queue
        queue.requests.append(request)
        queue.batch.add(request.texts)

    def drop(self, requests: Collection[GenerationRequest]) -> None:
        """Stop generating for these requests."""
        for queue in self._queues.values():
            queue.batch.drop([text for request in queue.requests if request in requests for text in request.texts])
            queue.requests = [request for request in queue.requests if request not in requests]
        self._queues = {model_id: queue for model_id, queue in self._queues.items() if queue.requests}

    def step(self, now: float) -> Iterator[tuple[GenerationRequest, PostError | None]]:
        """Generate one token for every running text. Yields every request, with the error that ended it, if any."""
        late = [request for request in self.requests if request.deadline <= now]
        self.drop(late)
        for request in late:
            yield request, Timeout("the request timed out; ask for fewer texts or tokens, or try again later")
        for queue in list(self._queues.values()):
            try:
                queue.batch.step()
            except Exception as error:
                failed, post_error = list(queue.requests), as_post_error(error)
                self.drop(failed)
                for request in failed:
                    yield request, post_error
                continue
            requests = list(queue.requests)
            self.drop([request for request in requests if request.ended or _is_broken(request)])
            for request in requests:
                yield request, NOT_FINITE if _is_broken(request) else None


def _is_broken(request: GenerationRequest) -> bool:
    return any(text.row.broken for text in request.texts)
