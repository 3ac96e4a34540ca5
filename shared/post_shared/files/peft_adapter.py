"""Writing and reading a prompt as a PEFT prompt-tuning adapter folder, without PEFT itself.

The adapter's weights are the unchanged prompt file; beside it is the configuration that
``peft.PeftModel.from_pretrained(model, folder)`` needs. Never imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from post_shared.errors import PromptFileInvalid
from post_shared.files.prompt_file import MAX_BYTES, MAX_HEADER, MAX_LENGTH, MAX_WIDTH, TENSOR, PromptFile, write_prompt
from post_shared.files.safetensors_header import PREFIX, HeaderInvalid, header_length, parse_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION"}
"""PEFT has no type for masked models; this one runs the given model, so its output has logits."""
DTYPES = {"F32": "<f4", "F16": "<f2"}


def to_peft_adapter(
    prompt: PromptFile, folder: Path, base_model: str, *, kind: Literal["causal", "masked"] = "causal"
) -> None:
    """Write the adapter folder. ``base_model`` is the model's name or path for PEFT users."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": TASK_TYPES[kind],
        "base_model_name_or_path": base_model,
        "num_virtual_tokens": prompt.length,
        "token_dim": prompt.width,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS).write_bytes(write_prompt(prompt))


def from_peft_adapter(folder: Path) -> NDArray[np.float32]:
    """The embeddings (l, d), float32, of a prompt-tuning adapter that PEFT or POST wrote.

    Raises:
        PromptFileInvalid: no such adapter, another kind of adapter, or weights that aren't one valid matrix.
    """
    config = _config(folder)
    if config.get("peft_type") != "PROMPT_TUNING":
        raise PromptFileInvalid(f"{folder.name}: a {config.get('peft_type')} adapter; POST reads PROMPT_TUNING ones")
    embeddings = _embeddings(folder / WEIGHTS)
    length, width = embeddings.shape
    if (config.get("num_virtual_tokens"), config.get("token_dim")) != (length, width):
        raise PromptFileInvalid(f"{folder.name}: {CONFIG} gives another shape than the weights' {length} x {width}")
    return embeddings


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PromptFileInvalid(f"{folder}: not an adapter folder: {CONFIG} is missing or not JSON") from error
    if not isinstance(config, dict):
        raise PromptFileInvalid(f"{folder.name}: {CONFIG} is not a JSON object")
    return config


def _embeddings(path: Path) -> NDArray[np.float32]:
    if not path.is_file():
        raise PromptFileInvalid(f"{path.parent.name}: {WEIGHTS} is missing (pickled .bin adapters are refused)")
    if path.stat().st_size > MAX_BYTES:
        raise PromptFileInvalid(f"{path.name}: larger than the {MAX_BYTES} bytes that a prompt may have")
    data = path.read_bytes()
    try:
        end = PREFIX + header_length(data[:PREFIX], len(data), MAX_HEADER)
        entries = parse_header(data[PREFIX:end], len(data) - end).entries
    except HeaderInvalid as error:
        raise PromptFileInvalid(f"{path.name}: {error}") from error
    if [entry.name for entry in entries] != [TENSOR] or len(entries[0].shape) != 2:
        raise PromptFileInvalid(f"{path.name}: a prompt adapter contains exactly one matrix, {TENSOR!r}")
    length, width = entries[0].shape
    if entries[0].dtype not in DTYPES or not 1 <= length <= MAX_LENGTH or not 1 <= width <= MAX_WIDTH:
        raise PromptFileInvalid(f"{path.name}: {entries[0].dtype} {length} x {width} is not a prompt that POST reads")
    embeddings = np.frombuffer(data, DTYPES[entries[0].dtype], offset=end).reshape(length, width).astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise PromptFileInvalid(f"{path.name}: the prompt contains NaN or infinite values")
    return embeddings
