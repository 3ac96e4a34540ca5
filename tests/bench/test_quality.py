"""``post bench quality`` on a tiny model: every method, resumable, never mixing settings."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from post_bench.methods import QualityConfig, wanted
from post_bench.quality import Bench
from post_bench.results import Figure, Results, gap_share, overall, summary, table
from post_bench.sets import LabelledSet, pairs, read_prose, read_set, some_prose, task_of
from post_bench.spent import Spent
from post_shared.cli.app import EXIT_INTERRUPTED, build_app, run
from post_shared.data.rows import Row
from post_shared.errors import Cancelled, DataInvalid, InvalidInput
from post_shared.schemas.distillations import DistilOptions
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, tiny_model

ALL = (
    "zero_shot",
    "calibrated_plain",
    "calibrated",
    "direct_reuse",
    "prompted_student",
    "proxy",
    "untuned",
    "paper",
    "post",
    "upper_bound",
    "prompted_student_dp",
    "post_dp",
)
SMALL = QualityConfig(
    distil=DistilOptions(keep_layers=2, steps=2, batch_tokens=32, sequence_length=16),
    plain=TuneOptions(num_virtual_tokens=3, steps=2, batch_size=4),
    private=TuneOptions(num_virtual_tokens=3, steps=2, batch_size=4),
    upper=TuneOptions(num_virtual_tokens=3, steps=2, batch_size=4),
    transfer=TransferOptions(steps=2, batch_size=4),
    max_length=32,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name, word in (("films", ""), ("products", "this phone: ")):
        (folder / name).mkdir(parents=True)
        lines, more = [], []
        for text, label in zip(TEXTS, LABELS, strict=True):
            lines.append(json.dumps({"text": word + text, "label": label}))
            more += [json.dumps({"text": f"{word}{text} {end}", "label": label}) for end in ("plot", "film", "story")]
        (folder / name / "train.jsonl").write_text("\n".join(more), encoding="utf-8")
        with gzip.open(folder / name / "test.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
    (folder / "corpus.txt").write_text("\n".join(text * 3 for text in TEXTS * 4), encoding="utf-8")
    return folder


def _bench(data: Path, out: Path, **more: object) -> Bench:
    results = Results.open(out / "q.json", {"settings": "small"})
    return Bench(tiny_model("llama", layers=3), data, out / "work", SMALL, results, **{"public": ["products"]} | more)  # type: ignore[arg-type]


def test_every_method_has_its_figure(data: Path, tmp_path: Path) -> None:
    bench = _bench(data, tmp_path)
    keys = wanted([("films", "products")], list(ALL), seeds=2)
    bench.run(keys)
    rows = json.loads((tmp_path / "q.json").read_text("utf-8"))["rows"]
    assert {(row["method"], row["seed"]) for row in rows} == {(method, seed) for method in ALL for seed in (0, 1)}
    assert all(0 <= row["accuracy"] <= 1 and row["n_test"] == len(TEXTS) and row["seconds"] > 0 for row in rows)
    assert all(len(row["right"]) == row["n_test"] for row in rows)
    assert all(row["right"].count("1") == round(row["accuracy"] * row["n_test"]) for row in rows)
    assert all((row["epsilon"] == 8.0) == row["method"].endswith("_dp") for row in rows)
    paper = next(row for row in rows if row["method"] == "paper")
    assert paper["settings"]["method"] == "paper"
    assert {row["settings"]["method"] for row in rows if row["method"].startswith("post")} == {SMALL.transfer.method}


def test_a_stopped_run_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that are there aren't made again, and neither are the models and prompts behind missing ones."""
    keys = wanted([("films", "products")], ["prompted_student", "post"], seeds=1)
    _bench(data, tmp_path).run(keys[:1])
    before = (tmp_path / "q.json").read_text("utf-8")
    monkeypatch.setattr("post_bench.quality.distil", lambda *_, **__: pytest.fail("distilled again"))
    monkeypatch.setattr("post_bench.quality.tune", lambda *_, **__: pytest.fail("tuned again"))
    bench, seen = _bench(data, tmp_path), []
    bench.run(keys, seen.append)
    rows = json.loads((tmp_path / "q.json").read_text("utf-8"))["rows"]
    assert rows[0] == json.loads(before)["rows"][0]
    assert [row["method"] for row in rows] == ["prompted_student", "post"]
    assert seen == [rows[0]["seconds"]], "no transfer was timed before: the time left is what a figure took so far"


def test_a_stopped_work_keeps_its_time(tmp_path: Path) -> None:
    now = [100.0]

    def work(until: list[float]) -> Spent:
        spent = Spent(tmp_path / "out" / "prompt.safetensors", lambda: now[0])
        report = spent.noting(lambda _: None)
        for now[0] in until:
            report(Progress(1, 2, "tune"))
        return spent

    work([104.0, 112.0, 115.0])  # killed: what came since the last note is lost
    now[0] = 1000.0
    again = work([1002.0])
    assert again.seconds == 14.0
    assert again.over() == 14.0
    assert work([1005.0]).seconds == 3.0  # anew
    assert not list((tmp_path / "out").iterdir())


def test_figures_hold_the_time_before_a_stop(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = wanted([("films", "products")], ["prompted_student"], seeds=1)
    bench = _bench(data, tmp_path)
    bench.run(wanted([("films", "products")], ["zero_shot"], seeds=1))

    def stop(what: str, progress: Progress) -> None:
        if what.startswith("tuned"):
            raise Cancelled("enough")

    bench.tell = stop
    monkeypatch.setattr("post_bench.spent.EVERY", 0.0)
    with pytest.raises(Cancelled):
        bench.run(keys)
    (kept,) = (tmp_path / "work").glob("tuned-*.seconds")
    kept.write_text("1000.0", encoding="utf-8")
    _bench(data, tmp_path).run(keys)
    (row,) = (
        row
        for row in json.loads((tmp_path / "q.json").read_text("utf-8"))["rows"]
        if row["method"] == "prompted_student"
    )
    assert 1000 < row["seconds"] < 1100
    assert not kept.exists()


def test_the_student_never_sees_the_private_set(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("post_bench.quality.distil", lambda target, corpus, *_, **__: seen.extend(corpus) or target)
    bench = _bench(data, tmp_path, public=["products", "films"])  # another pair of the run could have films in public
    bench.run(wanted([("films", "products")], ["prompted_student"], seeds=1))
    assert not set(seen) & {row.text for row in read_set(data, "films").train}
    assert {row.text for row in read_set(data, "products").train} <= set(seen)


def test_figures_are_of_one_student(data: Path, tmp_path: Path) -> None:
    first, second = (wanted([("films", "products")], ["prompted_student"], seeds=2)[at : at + 1] for at in (0, 1))
    _bench(data, tmp_path).run(first)
    (folder,) = (tmp_path / "work").glob("student-products-????????????")
    folder.rename(tmp_path / "aside")
    with pytest.raises(DataInvalid, match="student of the figures so far"):
        _bench(data, tmp_path).run(second)
    assert not folder.exists()
    tiny_model("llama", layers=2, seed=5).save(folder)
    with pytest.raises(DataInvalid, match="student of the figures so far"):
        _bench(data, tmp_path).run(second)
    shutil.rmtree(folder)
    (tmp_path / "aside").rename(folder)
    _bench(data, tmp_path).run(second)
    assert len(json.loads((tmp_path / "q.json").read_text("utf-8"))["rows"]) == 2


def test_the_order_of_the_public_sets_makes_no_other_student(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "products", data / "devices")
    orders = (["products", "devices"], ["devices", "products", "devices"])
    assert len({_bench(data, tmp_path, public=order).public for order in orders}) == 1


def test_figures_of_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    _bench(data, tmp_path).run(wanted([("films", "products")], ["zero_shot"], seeds=1))
    with pytest.raises(DataInvalid, match="other settings"):
        Results.open(tmp_path / "q.json", {"settings": "large"})
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataInvalid, match="no results"):
        Results.open(tmp_path / "other.json", {})


def test_a_run_that_found_nothing_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    wrong = Results(tmp_path / "q.json", {"layers": 9}, students={"products": {"seconds": 1.0}})
    wrong.save()
    found = Results.open(tmp_path / "q.json", {"layers": 8})
    assert (found.about, found.students) == ({"layers": 8}, {})
    assert Results.open(tmp_path / "q.json", {"layers": 9}).students


def test_a_stop_says_how_to_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("post_bench.quality.Bench.run", stop)
    tiny_model("llama", layers=3).save(tmp_path / "target")
    command = ["bench", "quality", "--data", str(data), "--private", "films", "--public", "products"]
    command += ["--json", str(tmp_path / "q.json"), "--target", str(tmp_path / "target"), "--max-length", "32"]
    assert run(build_app(), command) == EXIT_INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As typed: a saved model, one pair, JSON, table and picture."""
    tiny_model("llama", layers=3).save(tmp_path / "target")
    out = tmp_path / "out" / "q.json"
    out.parent.mkdir()
    command = ["bench", "quality", "--data", str(data), "--private", "films", "--public", "products"]
    command += ["--json", str(out), "--target", str(tmp_path / "target"), "--student", str(tmp_path / "target")]
    command += ["--seeds", "1", "--methods", "zero_shot,prompted_student", "--tune-steps", "2", "--test-rows", "6"]
    command += ["--max-length", "32"]
    assert run(build_app(), command) == 0
    shutil.copy(out, data)  # beside the sets, too, it can be gone on with
    assert run(build_app(), [str(data / out.name) if part == str(out) else part for part in command]) == 0
    document = json.loads(out.read_text("utf-8"))
    assert [row["method"] for row in document["rows"]] == ["zero_shot", "prompted_student"]
    assert {row["n_test"] for row in document["rows"]} == {6}
    assert "| prompted student (C) |" in out.with_suffix(".md").read_text("utf-8")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run(build_app(), [*command[:-1], "31"]) == 1, "another setting isn't mixed in"
    assert "other settings (config)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--private", "nothing"], "films, products"),
        (["--methods", "magic"], "magic"),
        (["--seeds", "0"], "seeds"),
        (["--methods", ","], "--methods"),
        (["--epsilon", "-1"], "epsilon"),
        (["--max-minutes", "-1"], "minutes"),
        (["--plot", "picture.txt"], "no kind of picture"),
        (["--tune-steps", "0"], "--tune-steps"),
    ],
)
def test_bad_input_is_named(data: Path, tmp_path: Path, change: list[str], message: str, capsys: object) -> None:
    tiny_model("llama", layers=3).save(tmp_path / "target")
    command = ["bench", "quality", "--data", str(data), "--public", "products", "--json", str(tmp_path / "q.json")]
    command += ["--target", str(tmp_path / "target"), *change]
    command += [] if "--private" in change else ["--private", "films"]
    assert run(build_app(), command) in (1, 2)
    assert message in capsys.readouterr().err  # type: ignore[attr-defined]


# --- the parts ----------------------------------------------------------------------------------------


def test_sets_and_tasks(data: Path) -> None:
    films = read_set(data, "films")
    assert (len(films.train), len(films.test), len(films.texts)) == (24, 8, 24)
    assert len(read_prose(data)) == 32
    assert set(task_of(data, films, {}).labels) == {"negative", "positive"}
    assert task_of(data, films, {"films": "imdb"}) != "agnews"
    odd = LabelledSet("odd", (Row("a", "left"), Row("b", "right/wrong")), ())
    assert task_of(data, odd, {}).label_words == {"left": ("left",), "right/wrong": ("right/wrong", "right", "wrong")}
    (data / "odd").mkdir()
    form = {"template": "{text}", "label_words": {"left": ["bad"], "right/wrong": ["good"]}}
    (data / "odd" / "task.json").write_text(json.dumps(form), encoding="utf-8")
    assert task_of(data, odd, {}).labels == ("left", "right/wrong")


def test_prose_is_drawn_until_there_is_enough() -> None:
    paragraphs = [str(number) * 10 for number in range(10)]
    some = some_prose(paragraphs, 35)
    assert len(some) == 4
    assert some == some_prose(paragraphs, 31) != paragraphs[:4]
    assert sorted(some_prose(paragraphs, 1000)) == paragraphs


def test_pairs_leave_a_set_with_itself_out() -> None:
    assert pairs(["a", "b"], ["a", "c"]) == [("a", "c"), ("b", "a"), ("b", "c")]
    with pytest.raises(InvalidInput):
        pairs(["a"], ["a"])


def _figure(method: str, seed: int, accuracy: float) -> Figure:
    return Figure("films", "products", method, seed, accuracy, 400, 10.0, None, {})


def test_summary_is_the_mean_over_seeds() -> None:
    rows = [
        _figure("calibrated", 0, 0.5),
        _figure("calibrated", 1, 0.5),
        _figure("post", 0, 0.7),
        _figure("post", 1, 0.8),
    ]
    rows += [_figure("upper_bound", 0, 0.9), _figure("upper_bound", 1, 0.9)]
    post = next(each for each in summary(rows) if each["method"] == "post")
    assert post["accuracy"] == pytest.approx(0.75)
    assert post["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert post["gap_share"] == pytest.approx(0.625)
    assert "| POST | 0.750 ± 0.071 (+0.250) |" in table(rows)


def test_time_left_is_known_once_anything_is(tmp_path: Path) -> None:
    found = Results(tmp_path / "q.json", {})
    missing = [("a", "b", method, 1) for method in ("zero_shot", "post", "paper")]
    assert found.seconds_left(missing) is None
    for method, seconds in (("zero_shot", 10.0), ("post", 100.0), ("post", 300.0)):
        found.rows.append(Figure("a", "b", method, 0, 0.5, 10, seconds, None, {}))
    assert found.seconds_left(missing) == 10 + 200 + (10 + 200) / 2


def test_gap_share_needs_a_gap() -> None:
    assert gap_share(0.8, 0.5, 0.9) == pytest.approx(0.75)
    assert gap_share(0.8, None, 0.9) is None
    assert gap_share(0.8, 0.5, 0.5) is None


def figure(method: str, right: str, seed: int = 0, public: str = "products") -> Figure:
    return Figure("films", public, method, seed, right.count("1") / len(right), len(right), 1.0, None, {}, right)


def test_a_gain_is_measured_over_the_best_simple_alternative_row_by_row() -> None:
    rows = [
        figure("zero_shot", "0" * 40),
        figure("calibrated", "1" * 30 + "0" * 10),
        figure("prompted_student", "1" * 20 + "0" * 20),
        figure("post", "1" * 34 + "0" * 6, 0),
        figure("post", "1" * 36 + "0" * 4, 1),
        figure("upper_bound", "1" * 38 + "0" * 2),
    ]
    (post,) = [each for each in summary(rows) if each["method"] == "post"]
    assert post["over"] == "calibrated"
    assert post["gain"] == pytest.approx(35 / 40 - 30 / 40)
    assert 0 <= post["gain_low"] < post["gain"] < post["gain_high"], "paired: no row is worse than before"
    assert post["low"] < post["accuracy"] < post["high"]
    assert post["gap_share"] == pytest.approx(5 / 8)
    assert "(+0.125 [" in table(rows)
    assert "gain" not in next(each for each in summary(rows) if each["method"] == "calibrated")


def test_the_share_over_pairs_is_that_of_the_sums_and_small_gaps_say_nothing() -> None:
    rows = []
    for public, calibrated, post, upper in (("a", 10, 15, 20), ("b", 20, 20, 30), ("c", 39, 0, 39)):
        for method, count in (("calibrated", calibrated), ("post", post), ("upper_bound", upper)):
            rows.append(figure(method, "1" * count + "0" * (40 - count), public=public))
    assert overall(rows)["post"] == pytest.approx((5 + 0) / (10 + 10))
    assert overall(rows)["upper_bound"] == 1.0


def test_figures_of_before_rows_were_kept_have_no_interval() -> None:
    (old,) = summary([Figure("films", "products", "zero_shot", 0, 0.5, 40, 1.0, None, {})])
    assert (old["low"], old["high"]) == (None, None)
