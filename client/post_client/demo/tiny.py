"""The stand-ins for ``post demo --fast``: synthetic reviews and a tiny random model. No download."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from post_client.demo.settings import DemoSettings
from post_client.demo.texts import NEGATIVE, POSITIVE, DemoTexts, split
from post_shared.data.rows import Row

PRAISE = "great good superb lovely clever moving funny brilliant charming gripping warm fresh"
BLAME = "terrible bad awful dull boring clumsy tired flat lazy noisy empty bland"
FILM = "film plot story cast script ending comedy drama scene director"
THING = "phone camera player battery screen speaker router cable printer keyboard"
DEGREE = "very rather truly simply quite really so wholly"
LINES = (
    "the {noun} is {degree} {word} and the {other} is {second}",
    "a {word} , {second} {noun} from start to finish",
    "{degree} {word} : this {noun} has a {second} {other}",
    "i expected more of the {noun} , but the {other} was {degree} {word} and {second}",
)


def tiny_texts(settings: DemoSettings) -> DemoTexts:
    """Synthetic data sets with the sizes of ``settings``."""
    films = synthetic_reviews(FILM, 4 * (settings.train_rows + settings.test_rows), settings.seed)
    products = synthetic_reviews(THING, 4 * settings.public_rows, settings.seed + 1)
    prose = [row.text for row in synthetic_reviews(THING, 400, settings.seed + 2)]
    return split(films, products, prose, settings)


def synthetic_reviews(nouns: str, count: int, seed: int) -> list[Row]:
    """``count`` reviews about the ``nouns``, half positive and half negative."""
    generator = random.Random(seed)  # noqa: S311  synthetic texts
    rows = []
    for number in range(count):
        words, label = ((PRAISE, POSITIVE), (BLAME, NEGATIVE))[number % 2]
        word, second = generator.sample(words.split(), 2)
        noun, other = generator.sample(nouns.split(), 2)
        line = generator.choice(LINES)
        degree = generator.choice(DEGREE.split())
        rows.append(Row(line.format(noun=noun, other=other, word=word, second=second, degree=degree), label))
    return rows


def tiny_model(folder: Path, texts: Sequence[str], seed: int) -> Path:
    """A four-layer causal model of 200,000 weights, with a tokenizer trained on ``texts``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet)
    sentences = [f"{text} It was {word}" for text in texts for word in ("great", "good", "terrible", "bad")]
    core.train_from_iterator(sentences, trainer)
    special_tokens = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special_tokens)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
