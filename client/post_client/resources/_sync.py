"""Blocking resources wrap the methods of the asynchronous ones, so each method is written and documented once."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from post_client.http.session import Http
from post_client.http.transports import run, run_all

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


class AsyncResource:
    """One resource of the API. Its methods are coroutines."""

    def __init__(self, http: Http) -> None:
        self._http = http


class Resource(Generic[R]):
    """The same resource with blocking methods."""

    def __init__(self, resource: R) -> None:
        self._async = resource


class Method(Generic[P, T]):
    """A blocking method of :class:`Resource`, with the signature and docstring of the coroutine that it wraps."""

    def __init__(self, method: Callable[..., Any], call: Callable[[Any], T]) -> None:
        self._method = method
        self._call = call
        self.__doc__ = method.__doc__

    def __get__(self, resource: Any, kind: type | None = None) -> Callable[P, T]:
        # On the class, the wrapped function is only inspected, for help().
        method = self._method if resource is None else self._method.__get__(resource._async)

        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return self._call(method(*args, **kwargs))

        return call


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Method[P, T]:
    """A method that returns one item."""
    return Method(method, run)


def iterating(method: Callable[Concatenate[Any, P], AsyncIterator[T]]) -> Method[P, Iterator[T]]:
    """A method that yields items."""
    return Method(method, run_all)


def blocking_as(kind: Callable[[S], T], method: Callable[Concatenate[Any, P], Coroutine[Any, Any, S]]) -> Method[P, T]:
    """A method that returns one item, wrapped in the blocking class ``kind``."""
    return Method(method, lambda coroutine: kind(run(coroutine)))


def iterating_as(
    kind: Callable[[S], T], method: Callable[Concatenate[Any, P], AsyncIterator[S]]
) -> Method[P, Iterator[T]]:
    """A method that yields items, each wrapped in the blocking class ``kind``."""
    return Method(method, lambda items: map(kind, run_all(items)))
