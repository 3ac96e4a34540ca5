"""How far can one row move the clipped sum of a private step, in students that are made to cheat?

    python -m benchmarks.sensitivity --neighbours 1000 --json FILE

Each kind of hostile student is drawn anew from its seeds: weights, buffers, configurations and tokenizers. For each,
many neighbouring data sets (a few rows; the same rows and one more) go through the step that `post tune` makes. The
guarantee needs ‖difference‖ <= c for all of them. A student that `post tune` refuses is counted as refused. As a
control, the same rows share one pass, as they did in the first version: that shows that the attack works.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tests.models import LABELS, TEXTS, WORDS, tiny_model, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig

from post_client.privacy import PrivacyConfig, PrivacyPlan, PromptDPSGD
from post_client.privacy.dp_optimizer import RowGradient
from post_client.students.checks import check_keeps_no_state, check_tokenizer
from post_shared.data.batches import Batch, EncodedRows
from post_shared.data.tasks import Task
from post_shared.errors import PostError
from post_shared.method.tuning.tune import tuning_objective
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.training.optimizer import Loss

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
LENGTH, CLIP, POOL = 4, 0.1, 48
PLAN = PrivacyPlan.make(PrivacyConfig(seed=0, max_grad_norm=CLIP), 100, batch_size=8, steps=1)
SLACK = 1e-6
"""Of c: what float64 sums may lose."""


class OnePass(PromptDPSGD):
    """The control: all rows of a batch share a pass, so that rounding depends on who shares it."""

    def row_gradients(self, loss: Loss, batch: Batch) -> Iterator[RowGradient]:
        if not len(batch):
            return
        leaf = self.prompt.detach().expand(len(batch), -1, -1).clone().requires_grad_()
        losses = loss(leaf, batch)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        for row, value, gradient in zip(batch.index, losses.detach(), gradients, strict=True):
            yield RowGradient(row, value, gradient)


# --- hostile students ---------------------------------------------------------------------------------


def rounding(seed: int) -> LanguageModel:
    """The true gradient of every row is 0, and the last bit of a probability decides the sign of what is left.

    A channel of the head weighs 10^k for all label words, so the gradients of the classes cancel but for rounding. The
    channel itself is 0 and depends on the prompt through an attention layer whose input is 0 as well.
    """
    model = tiny_model("llama", layers=1, seed=seed)
    core = model.model
    core.lm_head.weight = nn.Parameter(core.get_input_embeddings().weight.detach().clone(), requires_grad=False)
    layer, embeddings = core.model.layers[0], core.get_input_embeddings().weight
    words = [
        model.tokenizer(" " + w, add_special_tokens=False).input_ids[0] for w in ("bad", "terrible", "good", "great")
    ]
    with torch.no_grad():
        embeddings[:, :2] = 0.0
        layer.mlp.down_proj.weight[:2] = 0.0
        layer.self_attn.o_proj.weight[:2] = 0.0
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.v_proj.weight[:, 1] = 1.0
        layer.self_attn.o_proj.weight[0] = 1.0
        core.lm_head.weight[words, 0] = 10.0 ** (12 + seed % 20)
    return model


def overflow(seed: int) -> LanguageModel:
    """Some rows overflow: infinite losses, NaN gradients."""
    model = tiny_model("gpt2", layers=1, seed=seed)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.mul_(10.0 ** (1 + seed % 12))
    return model


def positions(seed: int) -> LanguageModel:
    """Positions, windows and scalings that follow from lengths."""
    drawn = random.Random(seed)
    family = drawn.choice(["llama", "gpt2", "bloom", "gemma2", "opt", "roberta", "bert"])
    model = tiny_model(family, layers=2, seed=seed)
    if family == "llama":
        half = model.config.head_dim // 2
        model.config.rope_parameters = drawn.choice(
            [
                {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 8},
                {
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": drawn.randint(6, 20),
                    "short_factor": [1.0] * half,
                    "long_factor": [9.0] * half,
                },
                {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            ]
        )
        weights = model.model.state_dict()
        model = LanguageModel(type(model.model)(model.config), model.tokenizer)
        model.model.load_state_dict(weights)
    return model


def experts(seed: int) -> LanguageModel:
    """Mixtures of experts whose routers, or their correction buffers, sit on a knife's edge."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    known = tokenizer(masked=False)
    if seed % 2:
        config: Any = MixtralConfig(vocab_size=len(known), num_key_value_heads=2, num_local_experts=4, **sizes)
    else:
        config = DeepseekV3Config(
            vocab_size=len(known), num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=1, first_k_dense_replace=0, moe_intermediate_size=24, kv_lora_rank=8, q_lora_rank=None,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, **sizes,
        )  # fmt: skip
    torch.manual_seed(seed)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), known)
    with torch.no_grad():
        for name, buffer in model.model.named_buffers():
            if "bias" in name:
                buffer.fill_(1e20 if seed % 4 else 0.5)
        for weight in model.model.parameters():
            weight.mul_(10.0)
    return model


def tokenizers(seed: int) -> LanguageModel:
    """Tokenizers that draw lots, pad to the longest row, or cut rows."""
    model = tiny_model("llama", layers=1, seed=seed)
    core = json.loads(model.tokenizer.backend_tokenizer.to_str())
    if seed % 3 == 0:
        core["model"]["dropout"] = 0.3
    elif seed % 3 == 1:
        core["padding"] = {
            "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 5,
            "pad_type_id": 0, "pad_token": "<pad>",
        }  # fmt: skip
    else:
        core["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(core))
        other = type(model.tokenizer).from_pretrained(folder)
    return LanguageModel(model.model, other)


KINDS: dict[str, Callable[[int], LanguageModel]] = {
    "rounding": rounding,
    "overflow": overflow,
    "positions": positions,
    "experts": experts,
    "tokenizers": tokenizers,
}


# --- neighbours ---------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one kind of student did."""

    students: int = 0
    refused: int = 0
    neighbours: int = 0
    largest: float = 0.0
    """Largest ‖difference‖ / c."""
    control: float = 0.0
    """The same with all rows in one pass."""


def pool(seed: int) -> tuple[list[str], list[str]]:
    """Made-up private rows: texts of several lengths, and their labels."""
    drawn, words = random.Random(seed), WORDS.split()
    texts = [f"{drawn.choice(TEXTS)} {' '.join(drawn.choices(words, k=drawn.randint(0, 12)))}" for _ in range(POOL)]
    return texts, [drawn.choice(LABELS) for _ in range(POOL)]


def clipped_sum(kind: type[PromptDPSGD], student: LanguageModel, batch: Batch, prompt: Tensor) -> Tensor:
    """The sum (l, d) of a step on these rows, before noise."""
    made = PLAN.optimizer(nn.Parameter(prompt.clone().to(student.device)), 0.1)
    made.__class__ = kind
    made.begin()
    for _ in made.accumulate(tuning_objective(student, TASK), batch):
        pass
    return made.summed_gradient.clone()


def moved(
    kind: type[PromptDPSGD], student: LanguageModel, encoded: EncodedRows, prompt: Tensor, rows: Sequence[int]
) -> float:
    """‖sum with the last row - sum without‖ / c."""
    both = [clipped_sum(kind, student, encoded.batch(some), prompt) for some in (rows, rows[:-1])]
    return float((both[0] - both[1]).norm()) / CLIP


def attack(name: str, neighbours: int, *, seeds: int = 10, device: str = "cpu", control: int = 20) -> Found:
    """Neighbouring data sets through students of one kind, as many of them as there are seeds."""
    found, each = Found(), -(-neighbours // seeds)
    for seed in range(seeds):
        student = KINDS[name](seed)
        student.model.to(device)
        prompt = SoftPrompt.from_text(student, "the film was", LENGTH).embeddings
        found.students += 1
        try:
            check_tokenizer(student)
            check_keeps_no_state(student, prompt, 64)
        except PostError:
            found.refused += 1
            continue
        texts, labels = pool(seed)
        encoded = encode_rows(student, TASK, texts, 64, labels=labels, reserved=LENGTH)
        drawn = random.Random(seed)
        for number in range(each):
            rows = drawn.sample(range(POOL), drawn.randint(1, 8))
            found.largest = max(found.largest, moved(PromptDPSGD, student, encoded, prompt, rows))
            found.neighbours += 1
            if number < control:
                found.control = max(found.control, moved(OnePass, student, encoded, prompt, rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, default=1000, help="neighbouring data sets of each kind")
    parser.add_argument("--seeds", type=int, default=10, help="students of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    found = {}
    for name in given.kinds:
        result = attack(name, given.neighbours, seeds=given.seeds, device=given.device)
        found[name] = asdict(result)
        print(name, json.dumps(found[name]), flush=True)
    largest = max(each["largest"] for each in found.values())
    print(f"largest: {largest:.9f} c")
    if given.json:
        about = {"device": given.device, "machine": platform.machine(), "torch": torch.__version__}
        given.json.write_text(json.dumps({**about, "kinds": found}, indent=1) + "\n", "utf-8")
    raise SystemExit(largest > 1 + SLACK)


if __name__ == "__main__":
    main()
