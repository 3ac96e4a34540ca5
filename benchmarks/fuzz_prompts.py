"""Pushes mutated prompt files to a live API process: does it crash, and how much memory does it take?

``python -m benchmarks.fuzz_prompts --inputs 100000`` starts its own server, pushes all inputs and prints, as JSON,
crashes (5xx, lost connections) and the peak memory above the baseline. Exit code 1: a crash, or too much memory.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.live_api import LiveApi
from post_shared.files.prompt_file import PromptFile, write_prompt
from post_shared.schemas.tasks import TaskSpec

LIMIT_MEGABYTES = 200
WIDTH = 8
CONNECTIONS = 8
TASK = TaskSpec(template="{text}, it was", label_words={"positive": ["good"], "negative": ["bad"]})
Mutation = Callable[[random.Random, bytes], bytes]


def good_file(chance: random.Random, model_hash: str) -> bytes:
    """One of two hundred valid prompt files."""
    return _good_file(chance.randrange(200), model_hash)


@functools.cache
def _good_file(seed: int, model_hash: str) -> bytes:
    vectors = np.random.default_rng(seed).normal(size=(1 + seed % 20, WIDTH)).astype(np.float32)
    private = (8.0, 1e-5) if seed % 2 else (None, None)
    return write_prompt(PromptFile(vectors, model_hash, TASK, *private))


# --- mutations ----------------------------------------------------------------------------------------


def _flip(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data))]


def _grow(chance: random.Random, data: bytes) -> bytes:
    position = chance.randrange(len(data) + 1)
    return data[:position] + chance.randbytes(chance.choice([1, 8, 4096, 65_536])) + data[position:]


def _length(chance: random.Random, data: bytes) -> bytes:
    length = chance.choice(
        [0, 1, 7, len(data), abs(len(data) - 8), 2**31, 2**32, 2**63 - 1, 2**64 - 1, chance.getrandbits(64)]
    )
    return length.to_bytes(8, "little") + data[8:]


def _repeat(chance: random.Random, data: bytes) -> bytes:
    begin, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[begin:end] * chance.choice([1, 2, 100]) + data[end:]


def _header(chance: random.Random, data: bytes) -> bytes:
    """Replace some values of the header's JSON by arbitrary ones, and adjust its length."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for _ in range(chance.choice([1, 1, 2, 4])):
        members = header
        while isinstance(members, dict) and members:
            name = chance.choice(list(members))
            if isinstance(members[name], dict) and chance.random() < 0.8:
                members = members[name]
                continue
            change = chance.random()
            if change < 0.15:
                del members[name]
            elif change < 0.3:
                members[chance.choice(ODD_NAMES)] = members.pop(name)
            else:
                members[name] = chance.choice(ODD_VALUES)
            break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8 if chance.random() < 0.5 else 0)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _nested(chance: random.Random, data: bytes) -> bytes:
    depth = chance.choice([10, 1000, 100_000])
    text = chance.choice([b"[" * depth, b'{"a":' * depth, b'{"embeddings":' + b"[" * depth])
    return len(text).to_bytes(8, "little") + text + data[-64:]


def _noise(chance: random.Random, data: bytes) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 8, 9, 100, len(data), 100_000]))


ODD_NAMES = ["", "__metadata__", "embeddings", "\x00", "\ud800", "prompt_embeddings", "model_hash", "x" * 10_000]
ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, "", "F32", "F64", "BF16", "\ud800", "0" * 64),
    *([], [0], [-1, 8], [2**40, 2**40], [1] * 1000, [0, 2**63], [32, 0], {}, {"a": {}}, "x" * 100_000, "NaN", "1e-5"),
    *('{"template": "{text}"}', '{"template": "{text.__class__}"}', "[" * 50_000, '{"template":' + "[" * 5_000),
]
MUTATIONS: list[Mutation] = [_flip, _flip, _cut, _grow, _length, _repeat, _header, _header, _header, _nested, _noise]


def mutated(chance: random.Random, model_hash: str) -> bytes:
    """One input: a valid file with one or a few mutations."""
    data = good_file(chance, model_hash)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        try:
            data = chance.choice(MUTATIONS)(chance, data)
        except (ValueError, IndexError, OverflowError, AttributeError, TypeError, RecursionError):
            data = _noise(chance, data)  # an earlier mutation has made this one impossible
    return data


# --- against a server ---------------------------------------------------------------------------------


async def push_all(api: LiveApi, inputs: int, seed: int) -> dict[str, Any]:
    """Push all inputs and watch the memory of the process."""
    chance, answers, crashes = random.Random(seed), Counter[int](), []
    numbers = iter(range(inputs))
    process = psutil.Process(api.pid)

    async def push(client: httpx.AsyncClient) -> None:
        for number in numbers:
            if number % 5000 == 4999:
                print(f"{number + 1} inputs, {len(crashes)} crashes", file=sys.stderr)
            data = mutated(chance, api.model_hash)
            try:
                answer = await client.post("/v1/prompts", content=data)
            except httpx.TransportError as error:
                crashes.append(f"input {number}: {type(error).__name__}")
                continue
            answers[answer.status_code] += 1
            if answer.status_code not in (200, 201, 413, 422):
                crashes.append(f"input {number}: {answer.status_code} {answer.text[:200]}")

    async with httpx.AsyncClient(base_url=api.url, headers=api.owner, timeout=60, trust_env=False) as client:
        warm_up = [client.post("/v1/prompts", content=good_file(chance, api.model_hash)) for _ in range(20)]
        await asyncio.gather(*warm_up)
        baseline = peak = process.memory_info().rss
        tasks = [asyncio.ensure_future(push(client)) for _ in range(CONNECTIONS)]
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.2)
            peak = max(peak, process.memory_info().rss)
        await asyncio.gather(*tasks)
    return {
        "inputs": inputs,
        "seed": seed,
        "answers": {str(status): count for status, count in sorted(answers.items())},
        "crashes": len(crashes),
        "first_crashes": crashes[:5],
        "baseline_megabytes": round(baseline / 2**20, 1),
        "megabytes_above_baseline": round((peak - baseline) / 2**20, 1),
    }


def run(inputs: int, seed: int) -> dict[str, Any]:
    """Push all inputs to a new server and return the figures."""
    with tempfile.TemporaryDirectory(prefix="post-") as home, LiveApi(Path(home), width=WIDTH) as api:
        return asyncio.run(push_all(api, inputs, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = run(arguments.inputs, arguments.seed)
    print(json.dumps(figures, indent=2))
    sys.exit(bool(figures["crashes"] or figures["megabytes_above_baseline"] > LIMIT_MEGABYTES))


if __name__ == "__main__":
    main()
