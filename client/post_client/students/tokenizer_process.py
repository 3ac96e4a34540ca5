"""Tokenises rows in a process of its own: one that may hang, crash or run out of memory without a word of the rest.

Started by :mod:`post_client.students.bounded_tokenizer` with the tokenizer's folder. Reads a JSON line with the task,
then one with the text and the label of each row; answers ``ready``, then a JSON line for each row: the encoded row, or
what is wrong with it as a string.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

MEMORY = 2 * 2**30
"""Bytes that tokenising may take beyond what the libraries take."""


def main() -> None:
    from transformers import AutoTokenizer

    from post_shared.data.tasks import Task
    from post_shared.model.encoding import encode_rows
    from post_shared.model.language_model import LanguageModel
    from post_shared.schemas.tasks import TaskSpec

    first = json.loads(sys.stdin.readline())
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False, local_files_only=True)
    stand_in: Any = SimpleNamespace(tokenizer=tokenizer, kind=first["kind"], max_length=first["positions"])
    model, task = cast(LanguageModel, stand_in), Task.from_spec(TaskSpec.model_validate(first["task"]))
    _limit_memory()
    _answer("ready")
    for line in sys.stdin:
        row = json.loads(line)
        try:
            (encoded,) = encode_rows(
                model, task, [row["text"]], first["max_length"], labels=[row["label"]], reserved=first["reserved"]
            ).rows
            _answer(asdict(encoded))
        except BaseException as error:
            _answer(str(error))


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    """Where the system can: :data:`MEMORY` more than now."""
    with suppress(ImportError, OSError, ValueError):
        import resource
        from pathlib import Path

        now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


if __name__ == "__main__":
    main()
