"""The prompt file: the only thing that leaves the data owner. Never imports torch.

It is a safetensors file with exactly one tensor, ``prompt_embeddings``: float32 [length, width], so PEFT can read it as
a prompt-tuning adapter. Its metadata are strings:

==============  ==========================================================================
``format``      ``post.prompt``
``version``     ``1``
``model_hash``  SHA-256 of the model that the prompt was tuned on
``task``        JSON: the template and, for classification, the label words
``epsilon``     with differential privacy only: the ε that the data owner claims
``delta``       with differential privacy only: its δ
==============  ==========================================================================

A given prompt has exactly one encoding, and a reader accepts no other: key order, spaces and digits can't carry hidden
information.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput, PromptFileInvalid
from post_shared.files.safetensors_header import PREFIX, Header, HeaderInvalid, header_length, parse_header
from post_shared.schemas.tasks import TaskSpec

FORMAT, VERSION, TENSOR = "post.prompt", "1", "prompt_embeddings"
REQUIRED = {"format", "version", "model_hash", "task"}
PRIVACY = {"epsilon", "delta"}
MAX_BYTES = 64 * 2**20
MAX_HEADER = 512 * 2**10
MAX_LENGTH, MAX_WIDTH = 1000, 65_536


@dataclass(frozen=True, eq=False)
class PromptFile:
    """A prompt as it crosses the wire. ``epsilon`` and ``delta`` are both None without differential privacy."""

    embeddings: NDArray[np.float32]
    """(l, d)"""
    model_hash: str
    task: TaskSpec
    epsilon: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        if hasattr(self.embeddings, "detach"):  # a torch tensor
            object.__setattr__(self, "embeddings", self.embeddings.detach().cpu().numpy())
        _check_embeddings(self.embeddings)
        _check_hash(self.model_hash)
        _check_privacy(self.epsilon, self.delta)
        copied = np.array(self.embeddings, dtype="<f4", order="C", copy=True)
        object.__setattr__(self, "embeddings", copied)

    @property
    def length(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def width(self) -> int:
        return int(self.embeddings.shape[1])


def write_prompt(prompt: PromptFile) -> bytes:
    """The bytes of a prompt file, always the same for the same prompt.

    Raises:
        PromptFileInvalid: the task is too long for the header.
    """
    size = prompt.embeddings.nbytes
    tensor = {"dtype": "F32", "shape": list(prompt.embeddings.shape), "data_offsets": [0, size]}
    try:
        header = _json({"__metadata__": _metadata(prompt), TENSOR: tensor}).encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptFileInvalid("the task contains characters that aren't valid Unicode text") from error
    header += b" " * (-len(header) % 8)  # aligns the tensor to eight bytes
    if len(header) > MAX_HEADER:
        raise PromptFileInvalid(f"the task needs a header of {len(header)} bytes; at most {MAX_HEADER} are allowed")
    return len(header).to_bytes(PREFIX, "little") + header + prompt.embeddings.tobytes()


def read_prompt(data: bytes, *, max_bytes: int = MAX_BYTES) -> PromptFile:
    """Read untrusted bytes. Size, header, names, shape and dtype are checked before a tensor is created.

    Raises:
        PromptFileInvalid: names the failed check. Nothing else is ever raised.
    """
    if len(data) > max_bytes:
        raise PromptFileInvalid(f"{len(data)} bytes; a prompt file has at most {max_bytes}")
    try:
        end = PREFIX + header_length(data[:PREFIX], len(data), MAX_HEADER)
        header = parse_header(data[PREFIX:end], len(data) - end)
    except HeaderInvalid as error:
        raise PromptFileInvalid(str(error)) from error
    shape = _shape(header)
    metadata = _checked_metadata(header.metadata)
    embeddings = np.frombuffer(data, dtype="<f4", offset=end).reshape(shape)
    prompt = PromptFile(
        embeddings=embeddings,
        model_hash=metadata["model_hash"],
        task=_task(metadata["task"]),
        epsilon=_number(metadata, "epsilon"),
        delta=_number(metadata, "delta"),
    )
    if write_prompt(prompt) != data:
        raise PromptFileInvalid("it isn't in the one form of a prompt file: order, spaces or digits differ")
    return prompt


# --- parts --------------------------------------------------------------------------------------------


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _metadata(prompt: PromptFile) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model_hash": prompt.model_hash,
        # Not sorted: the order of the labels is the order of the scores.
        "task": _json(prompt.task.model_dump(exclude_none=True)),
    }
    if prompt.epsilon is not None and prompt.delta is not None:
        metadata |= {"epsilon": repr(float(prompt.epsilon)), "delta": repr(float(prompt.delta))}
    return metadata


def _shape(header: Header) -> tuple[int, int]:
    names = [entry.name for entry in header.entries]
    if names != [TENSOR]:
        raise PromptFileInvalid(f"it contains {len(names)} tensors; a prompt file contains one, {TENSOR!r}")
    entry = header.entries[0]
    if entry.dtype != "F32":
        raise PromptFileInvalid(f"the tensor has dtype {entry.dtype}; it must be F32")
    if len(entry.shape) != 2:
        raise PromptFileInvalid(f"the tensor has {len(entry.shape)} dimensions; it must have two, [length, width]")
    length, width = entry.shape
    _check_shape(length, width)
    return length, width


def _checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    unknown = sorted(set(metadata) - REQUIRED - PRIVACY)
    if unknown:
        raise PromptFileInvalid(f"unknown metadata {unknown[0][:40]!r}; only {sorted(REQUIRED | PRIVACY)} are allowed")
    missing = sorted(REQUIRED - set(metadata))
    if missing:
        raise PromptFileInvalid(f"the metadata {missing[0]!r} is missing")
    if metadata["format"] != FORMAT:
        raise PromptFileInvalid(f"the format is {metadata['format'][:40]!r}, not {FORMAT!r}")
    if metadata["version"] != VERSION:
        raise PromptFileInvalid(f"version {metadata['version'][:40]!r} is unknown; this release reads {VERSION!r}")
    return metadata


def _task(text: str) -> TaskSpec:
    try:
        document = json.loads(text)
        spec = TaskSpec.model_validate(document, strict=True)
        Task.from_spec(spec)
    except InvalidInput as error:
        raise PromptFileInvalid(f"the task: {error.detail}") from error
    except (ValueError, RecursionError) as error:  # JSON and pydantic errors are ValueErrors
        raise PromptFileInvalid("the task needs a template and, for classification, label words") from error
    return spec


def _number(metadata: dict[str, str], name: str) -> float | None:
    text = metadata.get(name)
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise PromptFileInvalid(f"{name} is {text[:40]!r}, not a number") from error  # type: ignore[index]


# --- checks -------------------------------------------------------------------------------------------


def _check_shape(length: int, width: int) -> None:
    if not 1 <= length <= MAX_LENGTH:
        raise PromptFileInvalid(f"the prompt has {length} vectors; it must have 1 to {MAX_LENGTH}")
    if not 1 <= width <= MAX_WIDTH:
        raise PromptFileInvalid(f"the vectors have width {width}; it must be 1 to {MAX_WIDTH}")


def _check_embeddings(embeddings: NDArray[np.float32]) -> None:
    if embeddings.dtype != np.float32 or embeddings.ndim != 2:
        raise PromptFileInvalid(f"a prompt is float32 [length, width], not {embeddings.dtype} {embeddings.shape}")
    _check_shape(*embeddings.shape)
    if not np.isfinite(embeddings).all():
        raise PromptFileInvalid("the prompt contains NaN or infinite values")


def _check_hash(text: str) -> None:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise PromptFileInvalid("model_hash is not a SHA-256 in lower-case hexadecimal")


def _check_privacy(epsilon: float | None, delta: float | None) -> None:
    if (epsilon is None) != (delta is None):
        raise PromptFileInvalid("epsilon and delta belong together: give both or neither")
    if epsilon is None or delta is None:
        return
    if not (isfinite(epsilon) and epsilon > 0):
        raise PromptFileInvalid(f"epsilon is {epsilon}; it must be a finite number above 0")
    if not 0 < delta < 1:
        raise PromptFileInvalid(f"delta is {delta}; it must lie between 0 and 1")
