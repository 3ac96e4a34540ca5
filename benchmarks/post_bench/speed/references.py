"""Reference implementations for this benchmark only: the paper's published transfer loop, and PEFT."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from post_shared.data.batches import Batch
from post_shared.data.tasks import Task
from post_shared.method.losses import divergence, soften, transfer_loss
from post_shared.model.language_model import LanguageModel
from post_shared.model.verbalizer import label_words

PADDED = 128
"""The published loop pads every text to this many tokens."""


class PublishedTransfer:
    """The transfer of the paper's published code: four forward passes per step, three of which never change.

    All positions of texts padded to 128 tokens go through the LM head with its whole vocabulary; the loss is Eq. 3.
    """

    def __init__(
        self, target: LanguageModel, student: LanguageModel, prompt: Tensor, *, alpha: float, temperature: float
    ) -> None:
        self.target, self.student, self.alpha, self.temperature = target, student, alpha, temperature
        self.source = prompt.to(student.device)
        self.prompt = nn.Parameter(prompt.clone().to(target.device))
        self.optimizer = torch.optim.Adam([self.prompt], lr=1e-3)

    def step(self, batch: Batch) -> None:
        with torch.no_grad():
            prompted = _answer_logits(self.student, batch, self.source)
            plain, target_plain = _answer_logits(self.student, batch, None), _answer_logits(self.target, batch, None)
        logits = _answer_logits(self.target, batch, self.prompt)
        temperature = self.temperature
        imitation = divergence(soften(prompted, temperature), soften(logits, temperature))
        shift = divergence(soften(prompted - plain, temperature), soften(logits - target_plain, temperature))
        self.optimizer.zero_grad()
        transfer_loss(imitation, shift, self.alpha).mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _answer_logits(model: LanguageModel, batch: Batch, prompt: Tensor | None) -> Tensor:
    """(P, V): selected from the logits of all positions."""
    inputs = model.embed(nn.functional.pad(batch.token_ids, (0, PADDED - batch.token_ids.shape[1])))
    if prompt is not None:
        inputs = torch.cat([prompt.to(inputs.dtype).expand(len(batch), -1, -1), inputs], dim=1)
    logits = model.model(inputs_embeds=inputs, use_cache=False).logits  # (B, L, V)
    shift = 0 if prompt is None else prompt.shape[0]
    return logits[batch.rows.to(logits.device), batch.positions.to(logits.device) + shift].float()  # type: ignore[no-any-return]


class PeftTrainer:
    """PEFT's prompt tuning with the Hugging Face Trainer, one batch at a time."""

    def __init__(self, model: LanguageModel, task: Task, *, length: int) -> None:
        from peft import PromptTuningConfig, TaskType, get_peft_model

        settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
        self.peft = get_peft_model(model.model, settings)
        words = label_words(model, task)
        self._answer_ids = [int(words.token_ids[int(row.argmax())]) for row in words.weights]
        self._cpu = model.device.type == "cpu"
        self._folder = tempfile.TemporaryDirectory()

    def seconds(self, batch: Batch) -> float:
        """Seconds of one step, without the Trainer's setup and cleanup."""
        from accelerate.state import AcceleratorState
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        spent: list[float] = []

        class Timer(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                spent.append(time.perf_counter() - self.began)

        arguments = TrainingArguments(
            self._folder.name,
            per_device_train_batch_size=len(batch),
            max_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=self._cpu,
            dataloader_pin_memory=False,
        )
        rows = [self._row(batch, index) for index in batch.index]
        trainer = Trainer(self.peft, arguments, train_dataset=rows, data_collator=_padded, callbacks=[Timer()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        AcceleratorState._reset_state(reset_partial_state=True)  # else no process group can be created here later
        return spent[0]

    def _row(self, batch: Batch, index: int) -> dict[str, list[int]]:
        row = batch.encoded.rows[index]
        ids = [*row.token_ids, self._answer_ids[row.label or 0]]
        return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}


def _padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest)[None, :] < lengths[:, None]).long()
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


class PeftPrompts:
    """Many prompts on one model with PEFT: one adapter per prompt, one request at a time."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Tensor]) -> None:
        from peft import PromptTuningConfig, TaskType, get_peft_model

        settings = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=prompts[0].shape[0], inference_mode=True
        )
        self.peft = get_peft_model(model.model, settings, adapter_name="0")
        for index, prompt in enumerate(prompts):
            if index:
                self.peft.add_adapter(str(index), settings)
            with torch.no_grad():
                self.peft.prompt_encoder[str(index)].embedding.weight.copy_(prompt)

    @torch.no_grad()
    def logits(self, prompt: int, token_ids: Sequence[int]) -> Tensor:
        """(V,): the logits after the last token of one text."""
        self.peft.set_adapter(str(prompt))
        ids = torch.tensor([list(token_ids)], device=self.peft.device)
        return self.peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, prompt: int, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """The greedy continuation of one text."""
        self.peft.set_adapter(str(prompt))
        ids = torch.tensor([list(token_ids)], device=self.peft.device)
        output = self.peft.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        return output[0].tolist()[-new_tokens:]  # type: ignore[no-any-return]
