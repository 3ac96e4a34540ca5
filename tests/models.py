"""Tiny models built from configurations: no downloads, fast to run, and the families' real code."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

from post_shared.data.batches import Batch
from post_shared.model.language_model import LanguageModel

WORDS = "the a film story plot was is it bad good great terrible boring fine awful superb dull nice"
TEXTS = [
    "a superb film",
    "the plot was dull and the story is boring",
    "nice",
    "an awful story, awful plot, awful film",
    "great film, it is a great story and a good plot, a film that was nice",
    "boring boring",
    "the film was fine",
    "terrible",
]
LABELS = ["positive", "negative", "positive", "negative", "positive", "negative", "positive", "negative"]


def tokenizer(*, masked: bool, bos: bool = False) -> PreTrainedTokenizerFast:
    """A small trained byte-level BPE tokenizer. ``masked`` puts a text into <s> … </s>, ``bos`` puts <s> before it."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator([" " + WORDS] * 50 + TEXTS * 20, trainer)
    if masked:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    elif bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special_tokens: dict[str, Any] = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if masked:
        special_tokens |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special_tokens)


def _config(family: str, layers: int, vocabulary: int) -> Any:
    small = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    body = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    grouped = {"num_key_value_heads": 2, "max_position_embeddings": 256}
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    configs = {
        "llama": lambda: LlamaConfig(**small, **body, **grouped, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**small, **body, **grouped),
        "gemma2": lambda: Gemma2Config(**small, **body, **grouped, head_dim=8, sliding_window=64),
        "gpt2": lambda: GPT2Config(**small, n_embd=32, n_layer=layers, n_head=4, n_positions=256, n_inner=64),
        "gpt_neox": lambda: GPTNeoXConfig(**small, **body, max_position_embeddings=256),
        "opt": lambda: OPTConfig(
            **small,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=256,
        ),
        "bloom": lambda: BloomConfig(**small, hidden_size=32, n_layer=layers, n_head=4),
        "bert": lambda: BertConfig(**small, **body, **dropped, max_position_embeddings=256),
        "roberta": lambda: RobertaConfig(**small, **body, **dropped, max_position_embeddings=258, type_vocab_size=1),
    }
    return configs[family]()


def per_row(prompt: Tensor | None, batch: Batch) -> Tensor | None:
    """The prompt (l, d) repeated for each row, so that every row runs its own: the plain reference."""
    return None if prompt is None else prompt.expand(len(batch), -1, -1)


CAUSAL = ("llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt", "bloom")
MASKED = ("bert", "roberta")


def tiny_model(family: str = "llama", *, layers: int = 4, seed: int = 0, bos: bool = False) -> LanguageModel:
    """A model of ``family`` with random weights, scaled up so that prompts and padding would have an effect."""
    masked = family in MASKED
    tokens = tokenizer(masked=masked, bos=bos)
    config = _config(family, layers, len(tokens))
    torch.manual_seed(seed)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_config(config)
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight.data.mul_(10.0)
    return LanguageModel(model, tokens)
