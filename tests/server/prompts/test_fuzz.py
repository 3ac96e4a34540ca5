"""Mutated prompt files never crash anything; ``benchmarks/fuzz_prompts.py`` tries a hundred thousand of them."""

from __future__ import annotations

import random
import tracemalloc

from benchmarks.fuzz_prompts import good_file, mutated, run

from post_shared.errors import PromptFileInvalid
from post_shared.files.prompt_file import read_prompt, write_prompt
from tests.server.http_harness import HttpHarness

HASH = "0" * 64


def test_mutated_bytes_raise_only_one_error_and_take_little_memory() -> None:
    chance, valid = random.Random(1), 0
    tracemalloc.start()
    for _ in range(700):
        data = mutated(chance, HASH)
        try:
            assert write_prompt(read_prompt(data)) == data  # valid files have the canonical form
            valid += 1
        except PromptFileInvalid:
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < valid < 300
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
    result = run(inputs=30, seed=3)
    assert (result["crashes"], sum(result["answers"].values())) == (0, 30)
    assert result["megabytes_above_baseline"] < 200
