"""The blocking nouns are lists of the asynchronous ones' verbs: a verb is written, and described, once."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from post_client.http.session import Http
from post_client.http.transports import run, run_all

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")
N = TypeVar("N")


class AsyncNoun:
    """One noun of the API, its verbs coroutines."""

    def __init__(self, http: Http) -> None:
        self._http = http


class Noun(Generic[N]):
    """The same noun; its verbs wait for the answer."""

    def __init__(self, verbs: N) -> None:
        self._verbs = verbs


class Verb(Generic[P, T]):
    """A verb of :class:`Noun`, with the signature and the docstring of the coroutine that it stands for."""

    def __init__(self, verb: Callable[..., Any], call: Callable[[Any], T]) -> None:
        self._verb = verb
        self._call = call
        self.__doc__ = verb.__doc__

    def __get__(self, noun: Any, kind: type | None = None) -> Callable[P, T]:
        verb = self._verb if noun is None else self._verb.__get__(noun._verbs)  # on the class: to look at, for help()

        @functools.wraps(verb)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return self._call(verb(*args, **kwargs))

        return call


def blocking(verb: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Verb[P, T]:
    """A verb that gives one thing."""
    return Verb(verb, run)


def iterating(verb: Callable[Concatenate[Any, P], AsyncIterator[T]]) -> Verb[P, Iterator[T]]:
    """A verb that gives one thing after the other."""
    return Verb(verb, run_all)


def blocking_as(kind: Callable[[S], T], verb: Callable[Concatenate[Any, P], Coroutine[Any, Any, S]]) -> Verb[P, T]:
    """A verb that gives something with verbs of its own."""
    return Verb(verb, lambda work: kind(run(work)))


def iterating_as(kind: Callable[[S], T], verb: Callable[Concatenate[Any, P], AsyncIterator[S]]) -> Verb[P, Iterator[T]]:
    """The same, one after the other."""
    return Verb(verb, lambda items: map(kind, run_all(items)))
