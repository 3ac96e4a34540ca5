"""Mutated prompt files never crash anything; ``benchmarks/fuzz_prompts.py`` does the same a hundred thousand times."""

from __future__ import annotations

import random
import tracemalloc

from benchmarks.fuzz_prompts import good_file, mutated, run

from post_shared.errors import PromptFileInvalid
from post_shared.files.prompt_file import read_prompt, write_prompt
from tests.server.http_harness import HttpHarness

HASH = "0" * 64


def test_whatever_the_bytes_are_only_one_error_comes_and_little_memory_goes() -> None:
    chance, taken = random.Random(1), 0
    tracemalloc.start()
    for _ in range(700):
        data = mutated(chance, HASH)
        try:
            assert write_prompt(read_prompt(data)) == data  # what is taken is in the one form
            taken += 1
        except PromptFileInvalid:
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < taken < 300
    assert peak < 50 * 2**20


def test_every_answer_to_a_mutated_file_is_a_refusal_or_a_prompt(http_harness: HttpHarness) -> None:
    _, student = http_harness.add_pair()
    chance, seen = random.Random(2), set()
    for _ in range(60):
        seen.add(http_harness.push("alice", mutated(chance, student.hash)).status_code)
    assert seen <= {200, 201, 422}
    assert http_harness.push("alice", good_file(chance, student.hash)).status_code == 201
    assert http_harness.everything()["temporary"] == []


def test_the_benchmark_runs() -> None:
    found = run(inputs=30, seed=3)
    assert (found["crashes"], sum(found["answers"].values())) == (0, 30)
    assert found["megabytes_above_baseline"] < 200
