"""PEFT loads adapters that POST writes and computes the same; POST reads adapters that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.numpy import save_file

from post_shared.errors import PromptFileInvalid
from post_shared.files.peft_adapter import from_peft_adapter, to_peft_adapter
from post_shared.files.prompt_file import PromptFile, read_prompt
from post_shared.schemas.tasks import TaskSpec
from tests.models import tiny_model

SPEC = TaskSpec(template="{text}, it was", label_words={"positive": ["good"], "negative": ["bad"]})


def prompt_file(length: int = 5, width: int = 32) -> PromptFile:
    embeddings = np.random.default_rng(0).normal(size=(length, width)).astype(np.float32)
    return PromptFile(embeddings, "0" * 64, SPEC)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_peft_computes_the_same_logits_as_a_prepended_prompt(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    prompt = prompt_file()
    to_peft_adapter(prompt, tmp_path, "tiny", kind=model.kind)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.ones_like(ids)
    vectors = torch.from_numpy(prompt.embeddings).expand(2, -1, -1)
    with torch.no_grad():
        expected = model.model(
            inputs_embeds=torch.cat([vectors, model.embed(ids)], dim=1),
            attention_mask=torch.ones(2, prompt.length + 4, dtype=torch.long),
        ).logits
        adapted = PeftModel.from_pretrained(model.model, tmp_path)
        actual = adapted(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual[:, prompt.length :], model.model(input_ids=ids).logits, atol=1e-3)


def test_the_adapters_weights_are_the_prompt_file(tmp_path: Path) -> None:
    prompt = prompt_file()
    to_peft_adapter(prompt, tmp_path, "tiny")
    assert read_prompt((tmp_path / "adapter_model.safetensors").read_bytes()).task == SPEC
    np.testing.assert_array_equal(from_peft_adapter(tmp_path), prompt.embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_adapter_that_peft_saved_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    tuned = get_peft_model(tiny_model().model, config)
    weights = tuned.prompt_encoder.to(dtype)["default"].embedding.weight.detach().clone()
    tuned.save_pretrained(tmp_path)
    embeddings = from_peft_adapter(tmp_path)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, weights.float().numpy())


def broken(folder: Path, **changes: object) -> None:
    to_peft_adapter(prompt_file(), folder, "tiny")
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [{"peft_type": "LORA"}, {"num_virtual_tokens": 6}, {"token_dim": None}])
def test_another_kind_or_shape_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    broken(tmp_path, **changes)
    with pytest.raises(PromptFileInvalid):
        from_peft_adapter(tmp_path)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    broken(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    good = np.ones((5, 32), np.float32)
    bad = [
        {"other": good},
        {"prompt_embeddings": good, "more": good},
        {"prompt_embeddings": good * np.nan},
        {"prompt_embeddings": good.astype(np.float64)},
        {"prompt_embeddings": good[0]},
    ]
    for tensors in bad:
        save_file(tensors, weights)
        with pytest.raises(PromptFileInvalid):
            from_peft_adapter(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(PromptFileInvalid):
        from_peft_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PromptFileInvalid, match="bin"):
        from_peft_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(PromptFileInvalid):
        from_peft_adapter(tmp_path)
