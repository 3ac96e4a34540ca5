"""Peak memory of a transfer relative to the target model's size, in a new process: ``python -m`` with a folder.

Like a worker, the process loads both models from their folders and transfers a prompt. Memory from before that
(Python, libraries, the code of the model family) doesn't count; the models themselves do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from post_bench.speed.machine import Peak
from post_shared.data.tasks import Task
from post_shared.method.transfer.transfer import transfer
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.transfers import TransferOptions

STEPS = 10


def transfer_memory(
    folder: Path, target: LanguageModel, student: LanguageModel, task: Task, texts: Sequence[str], prompt: torch.Tensor
) -> dict[str, float]:
    """``{"peak_bytes", "target_bytes", "ratio"}`` of a short transfer with the default settings."""
    for name, model in (("target", target), ("student", student)):
        if not (folder / name).exists():
            model.save(folder / name)
    label_words = {label: list(words) for label, words in (task.label_words or {}).items()}
    (folder / "task.json").write_text(json.dumps({"template": task.template, "label_words": label_words}), "utf-8")
    (folder / "transfer.json").write_text(json.dumps({"texts": list(texts), "prompt": prompt.tolist()}), "utf-8")
    command = [sys.executable, "-m", "post_bench.speed.memory", str(folder), str(target.device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the measured transfer failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(folder: Path, device: str) -> dict[str, float]:
    """Run the transfer, in the new process."""
    inputs = json.loads((folder / "transfer.json").read_text("utf-8"))
    for name in ("target", "student"):
        _ = AutoModel._model_mapping[type(AutoConfig.from_pretrained(folder / name))]  # imports the family's code
    task, prompt = Task.load(folder / "task.json"), torch.tensor(inputs["prompt"])
    with Peak(torch.device(device)) as peak:
        target = LanguageModel.load(folder / "target", device=device)
        student = partial(LanguageModel.load, folder / "student", device=device)
        transfer(target, student, task, SoftPrompt(prompt), inputs["texts"], TransferOptions(steps=STEPS))
    return {"peak_bytes": peak.bytes, "target_bytes": target.nbytes, "ratio": peak.bytes / target.nbytes}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
