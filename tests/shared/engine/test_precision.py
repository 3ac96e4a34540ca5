"""The data type of a model by measurement: what is measured, kept and overridden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from post_shared.engine import precision
from post_shared.engine.precision import Use, cache_file, choose_precision, inner_size, measure, time_share
from post_shared.errors import InvalidInput
from tests.models import CAUSAL, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POST_PRECISION", raising=False)
    precision._time_share.cache_clear()


@pytest.mark.parametrize(
    ("share", "dtype", "says"),
    [
        (0.3, torch.bfloat16, "3.3 times as fast"),
        (precision.GAIN, torch.bfloat16, "1.2 times as fast"),
        (0.9, torch.float32, "takes 0.90 of float32's time"),
        (2.0, torch.float32, "takes 2.00 of float32's time"),
    ],
)
def test_the_faster_type_is_chosen_if_it_gains_enough(
    share: float, dtype: torch.dtype, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "time_share", lambda *_: share)
    chosen = choose_precision(CPU, 576, 1536)
    assert chosen.dtype is dtype
    assert says in chosen.reason


def test_narrow_models_and_gpus_need_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "time_share", lambda *_: pytest.fail("measured"))
    assert choose_precision(CPU, precision.NARROW - 1).dtype is torch.float32
    assert choose_precision(torch.device("cuda"), 32).dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_variable_overrides_the_measurement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "time_share", lambda *_: pytest.fail("measured"))
    monkeypatch.setenv("POST_PRECISION", name)
    chosen = choose_precision(CPU, 576)
    assert chosen.document() == {"dtype": name, "reason": f"POST_PRECISION={name}"}


def test_another_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POST_PRECISION", "int8")
    with pytest.raises(InvalidInput, match="one of: auto, float32, bfloat16"):
        choose_precision(CPU, 576)


@pytest.mark.parametrize("use", get_args(Use))
def test_a_measurement_times_both_types(use: Use) -> None:
    assert 0 < measure(64, 128, use) < 100


def test_what_is_measured_is_kept_for_this_machine_and_use(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.25, 0.75])
    monkeypatch.setattr(precision, "measure", lambda *_: next(shares))
    assert time_share(300, 400, "training") == 0.25
    precision._time_share.cache_clear()  # another process
    assert time_share(300, 400, "training") == 0.25
    assert time_share(300, 400, "decoding") == 0.75
    kept = json.loads(cache_file().read_text())
    assert sorted(kept.values()) == [0.25, 0.75]
    assert all(f"torch {torch.__version__}" in name and "threads" in name for name in kept)


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', "\x00"])
def test_a_broken_file_costs_a_measurement_only(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure", lambda *_: 0.5)
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert time_share(300, 400, "training") == 0.5


def test_a_folder_that_can_not_be_written_costs_a_measurement_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(precision, "measure", lambda *_: 0.5)
    assert time_share(300, 400, "training") == 0.5


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_names_an_inner_size_or_has_the_usual_one(family: str) -> None:
    model = tiny_model(family, layers=1)
    widths = {tuple(each.shape) for each in model.model.parameters() if each.ndim == 2}
    inner = inner_size(model.config) or 4 * model.hidden_size
    assert any(inner in shape or 2 * inner in shape for shape in widths)
