"""The bench of quality: that every method ends at its sparsity, and that rows are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers.quality import LINES, SPARSITY, STEPS, gpt2, tiny
from lp_dist.benchmarks import json_lines, row_names
from lp_dist.benchmarks.quality import methods, oneshot, runs, tasks
from lp_dist.benchmarks.quality.methods import Spec
from lp_dist.benchmarks.quality.tasks import Schedule, Text
from lp_dist.cli import app
from lp_dist.errors import UsageError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LP_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# -- methods ------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "quality.jsonl"
    runs.run_all(tiny, runs.planned_rows(tiny(), map(Spec.read, LINES), [SPARSITY], [0]), path, jobs=1)
    return path


def test_every_method_ends_at_its_sparsity(rows):
    by_method = {row["method"]: row for row in json_lines.read(rows)}
    assert list(by_method) == LINES
    for method, row in by_method.items():
        # Wanda has as many zeros in each output, here of 16 inputs; the others are exact to a weight for each of 8
        # tensors.
        rounding = 0.5 / 16 if method.startswith("wanda") else 8 * 0.5 / row["weights"]
        assert row["zeros"] == (0 if method == "dense" else pytest.approx(SPARSITY, abs=rounding)), method
    assert by_method["dense"]["loss"] < by_method["dense"]["loss before"] - 0.1, "the fine-tune learns"
    assert len({row["loss before"] for row in by_method.values()}) == 1, "all start from the same dense model"
    assert len({row["loss"] for row in by_method.values()}) == len(LINES), "each does something of its own"


def _rates(schedule: Schedule) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.lr)
    scheduler, rates = schedule.scheduler(optimizer), []
    for _ in range(schedule.steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_learning_rate_is_stable_until_its_fraction():
    rates, plain = _rates(Schedule(20, 2.0, 3, stable_fraction=0.7)), _rates(Schedule(20, 2.0, 3))
    assert rates[:4] == plain[:4] == [0.5, 1.0, 1.5, 2.0] and rates[3:15] == [2.0] * 12, "up to 14 of 20 steps"
    assert rates[17] == pytest.approx(2.0 * (0.1 + 0.9 / 2)), "a cosine, of which this is the middle"
    assert rates[20] == plain[20] == pytest.approx(0.2) and plain[4] < 2.0
    assert runs.schedule_for(tiny(), Spec.read("lp:stable_fraction=0.5,lr=0")) == Schedule(
        STEPS, 0, 2, stable_fraction=0.5
    ), "0 is a learning rate as well"
    assert _rates(Schedule(20, 2.0, 3, stable_fraction=0.1)) == plain, (
        "a rate that is stable until before the end of the warm-up falls from there"
    )


def test_a_stable_rate_reaches_the_dense_fine_tune_and_the_methods_and_older_rows_had_none(rows, tmp_path):
    by_method = {row["method"]: row for row in json_lines.read(rows)}
    losses = {
        line: runs.measure_row(tiny(), {"method": line, "sparsity": share, "seed": 0})["loss"]
        for line, share in (
            ("dense:stable_fraction=0.5", 0.0),
            ("magnitude:at=1,stable_fraction=0.5", 0.0),
            ("lp:stable_fraction=0.5", SPARSITY),
            ("lp:stable_fraction=0", SPARSITY),
        )
    }
    assert (
        losses["dense:stable_fraction=0.5"]
        == losses["magnitude:at=1,stable_fraction=0.5"]
        != by_method["dense"]["loss"]
    )
    assert losses["lp:stable_fraction=0.5"] != by_method["lp"]["loss"] == losses["lp:stable_fraction=0"]
    old = {
        **by_method["lp"],
        "settings": {key: value for key, value in by_method["lp"]["settings"].items() if key != "stable_fraction"},
    }
    json_lines.append(tmp_path / "old.jsonl", old)
    assert runs.key_of(json_lines.read(tmp_path / "old.jsonl")[0]) == runs.key_of(by_method["lp"])
    assert tiny().described()["schedule"] == {
        "steps": STEPS,
        "lr": 3e-3,
        "warmup": 2,
        "last": 0.1,
    }, "as in rows from before"


def test_one_shot_prunes_what_the_dense_fine_tune_has_made(rows):
    dense = next(row for row in json_lines.read(rows) if row["method"] == "dense")
    pruned = runs.measure_row(tiny(), {"method": "magnitude:at=1", "sparsity": 0.0, "seed": 0})
    assert pruned["loss"] == dense["loss"], "nothing is pruned, so it is the same model"


def test_the_fine_tune_sees_other_batches_than_the_training_before_it(cache, monkeypatch):
    seeds, real = [], Text.batch

    def batch(self, generator, rows, block):
        seeds.append(generator.initial_seed())
        return real(self, generator, rows, block)

    monkeypatch.setattr(Text, "batch", batch)
    runs.measure_row(tiny(), {"method": "gmp", "sparsity": 0.5, "seed": 5})
    assert len(seeds) == 20 + STEPS and len(set(seeds[:20])) == 1 == len(set(seeds[20:])) and seeds[0] != seeds[-1]


def test_gmp_follows_its_plan_and_zeros_stay_zero(cache):
    seen, dead = [], {}

    class Watched(methods.GMP):
        def after_step(self, t):
            super().after_step(t)
            zeros = {name: weight == 0 for name, weight in self.run.weights.items()}
            assert all((zeros[name] | ~was).all() for name, was in dead.items())
            dead.update(zeros)
            seen.append(sum(int(z.sum()) for z in zeros.values()) / sum(z.numel() for z in zeros.values()))

    run = runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, Schedule(STEPS, 3e-3, 2))
    watched = Watched(run, start=0.25, end=0.75, update_every=4)
    generator = torch.Generator().manual_seed(0)
    for t in range(1, STEPS + 1):
        tiny().loss(run.model, *tiny().text.batch(generator, 4, 16)).backward()
        run.optimizer.step()
        watched.after_step(t)
    for t, share in enumerate(seen, start=1):
        last_update = min(max(10, 10 + (t - 10) // 4 * 4), 30) if t < 30 else 30
        planned = 0.0 if t < 10 else SPARSITY * (1 - (1 - (last_update - 10) / 20) ** 3)
        assert share == pytest.approx(planned, abs=2e-3), f"after {t} steps"


def test_pat_steps_on_from_the_dense_weights_and_prunes_them_anew(cache):
    """Written out: gradients at the pruned weights, the step at the dense ones, until the window ends; then the zeros
    stay.
    """
    run, twin = (runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, Schedule(STEPS, 3e-3, 2)) for _ in range(2))
    pat, generator, came_back, masks = methods.PAT(run, end=0.5), torch.Generator().manual_seed(0), 0, {}
    pat.start()
    dense = {name: weight.clone() for name, weight in twin.weights.items()}
    for t in range(1, STEPS + 1):
        batch = tiny().text.batch(generator, 4, 16)
        for each_run in (run, twin):
            each_run.optimizer.zero_grad()
            tiny().loss(each_run.model, *batch).backward()
        for name, weight in twin.weights.items():
            weight.copy_(dense[name])
        run.optimizer.step()
        twin.optimizer.step()
        pat.after_step(t)
        share = SPARSITY * (1 - (1 - (t - 4) / 16) ** 3)
        for name, weight in twin.weights.items():
            dense[name] = weight.clone()
            if 4 <= t <= 20:
                kept = oneshot.keep_largest({name: weight.abs()}, share, "layer")[name]
                came_back += int((kept & ~masks.get(name, kept)).sum())
                masks[name] = kept
            weight.mul_(masks.get(name, 1.0))
            if t >= 20:
                dense[name] = weight.clone()
            assert torch.equal(run.weights[name], weight), f"{name} after {t} steps"
    assert came_back > 20


def test_a_teacher_has_its_fraction_of_the_loss(cache, rows):
    model, other, batch = gpt2(0), gpt2(1), tiny().text.batch(torch.Generator().manual_seed(0), 4, 16)
    plain = tiny().loss(model, *batch)
    torch.testing.assert_close(tiny().loss(model, *batch, teacher=model, distill=0.25), 0.75 * plain)
    p, q = (m(input_ids=batch[0]).logits.softmax(-1).double() for m in (other, model))
    torch.testing.assert_close(
        tiny().loss(model, *batch, teacher=other, distill=1.0).double(), (p * (p.log() - q.log())).sum(-1).mean()
    )
    teacher, dense = (
        runs.load_teacher(tiny(), 0),
        next(row for row in json_lines.read(rows) if row["method"] == "dense"),
    )
    assert tiny().evaluate(teacher) == dense["loss"], "the dense fine-tune is the teacher"
    plain = next(row["loss"] for row in json_lines.read(rows) if row["method"] == "lp")
    assert runs.measure_row(tiny(), {"method": "lp:distill=0.5", "sparsity": SPARSITY, "seed": 0})["loss"] != plain


def test_the_saliency_of_gmp_is_that_of_adams_second_moments(cache):
    run = runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, Schedule(STEPS, 3e-3, 2))
    tiny().loss(run.model, *tiny().text.batch(torch.Generator().manual_seed(0), 4, 16)).backward()
    run.optimizer.step()
    name, weight = next(iter(run.weights.items()))
    v = run.optimizer.state[dict(run.model.named_parameters())[name]]["exp_avg_sq"]
    score = methods.GMP(run, c=0.33).saliency(name, weight)
    torch.testing.assert_close(score, weight.abs() * v.sqrt() ** 0.33)
    assert torch.equal(methods.GMP(run).saliency(name, weight), weight.abs())


@pytest.mark.parametrize(
    "line, word",
    [
        ("gmpp", "'gmpp' is none of"),
        ("lp:stable_fraction=1", "stable_fraction=1 must be at least 0"),
        ("lp:stable_fraction=late", "stable_fraction=late must be"),
        ("gmp:d=1", "gmp has no 'd'"),
        ("lp:p=x.y", "'x.y' is neither"),
        ("", "names nothing"),
    ],
)
def test_a_method_that_there_is_not_is_named(line, word):
    with pytest.raises(UsageError, match=word):
        methods.read_specs(line)


def test_a_line_says_the_same_when_it_is_read_again():
    for spec in methods.read_specs("baselines lp_dist forms lp:lr=3e-05,cap=none"):
        assert Spec.read(spec.line) == spec
    as_made = {
        **Spec.read("lp").settings,
        "latent_windows": 1.0,
        "precondition": 0.5,
        "lr": 2e-3,
    }  # what --methods lp wrote when 1 was the default
    assert Spec.from_settings("lp", as_made).line == "lp:latent_windows=1,lr=0.002,precondition=0.5"
    assert len(methods.FORMS) == 39 and len(methods.read_specs("forms gmp gmp")) == 40


# -- rows ---------------------------------------------------------------------


@pytest.mark.long
def test_what_has_a_row_is_not_run_again_and_processes_come_to_the_same(rows, tmp_path, monkeypatch):
    before = rows.read_text()
    monkeypatch.setattr(runs, "measure_row", lambda *_: pytest.fail("it has a row"))
    runs.run_all(tiny, runs.planned_rows(tiny(), map(Spec.read, LINES), [SPARSITY], [0]), rows, jobs=1)
    assert rows.read_text() == before
    monkeypatch.undo()
    again = tmp_path / "quality.jsonl"
    runs.run_all(tiny, runs.planned_rows(tiny(), map(Spec.read, ["gmp", "lp"]), [SPARSITY], [0]), again, jobs=2)
    alone = {row["method"]: row["loss"] for row in map(json.loads, before.splitlines())}
    assert {row["method"]: row["loss"] for row in json_lines.read(again)} == {
        method: alone[method] for method in ("gmp", "lp")
    }


def test_a_row_with_old_names_is_the_same_run(tmp_path):
    """Rows as they were written before: "work", `memory`, `grace`, `every`, `fall`, and settings without `fall`."""
    spec = Spec.read("lp:latent_windows=0,regrowth=0.2,stable_fraction=0.7,update_every=9")
    row = json.loads(json.dumps(runs.planned_rows(tiny(), [spec], [SPARSITY], [0])[0]))
    old_settings = {new: old for old, new in row_names.SETTINGS.items()}
    old = {"work" if key == "task" else key: value for key, value in row.items()}
    old["method"] = "lp:every=9,fall=0.7,grace=0.2,memory=0"
    old["settings"] = {old_settings.get(key, key): value for key, value in row["settings"].items()}
    assert {"memory", "grace", "every", "fall"} < set(old["settings"]) and "task" not in old
    json_lines.append(tmp_path / "old.jsonl", old)
    json_lines.append(tmp_path / "old.jsonl", row)
    read = json_lines.read(tmp_path / "old.jsonl")
    assert read[0] == read[1] == row, "nothing in an old row keeps its old name"
    assert runs.key_of(read[0]) == runs.key_of(row)
    with pytest.raises(UsageError, match="lp has no 'memory'"):
        Spec.read("lp:memory=0")


def test_the_rows_of_other_benchmarks_are_renamed_as_well():
    assert row_names.current_names({"part": "whole", "contender": "copy", "ours": {}, "blocks": 6, "run": 1}) == {
        "measured": "training step",
        "implementation": "copy",
        "lp_dist": {},
        "rounds": 6,
        "run": 1,
    }
    old = {"command": "lp-dist bench step --sizes '' --blocks 6 --no-whole"}
    assert row_names.current_names(old) == {"command": "lp-dist bench step --sizes '' --rounds 6 --no-training-steps"}
    assert row_names.current_line("dense") == "dense"


def test_a_model_teaches_itself_as_it_was_before_the_run(monkeypatch):
    """The first step's divergence is zero, and its loss the rest; and no dense fine-tune is made for it."""
    monkeypatch.setattr(runs, "load_teacher", None)
    losses = {}
    for line in ("dense", "lp:distill=0.75,teacher=self"):
        task = tiny()
        model = runs.dense(task, 0)  # it may be trained for that
        seen: list[float] = []
        loss_of = type(task).loss

        def noted(self, *batch, loss_of=loss_of, seen=seen, **more):
            loss = loss_of(self, *batch, **more)
            seen.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(type(task), "loss", noted)
        runs.train(task, model, 0, 0.5, task.schedule, Spec.read(line))
        monkeypatch.setattr(type(task), "loss", loss_of)
        losses[line] = seen
    dense, taught = losses.values()
    assert taught[0] == pytest.approx(0.25 * dense[0], rel=1e-5) and taught[-1] < dense[-1]
    for line in ("lp:teacher=self", "lp:distill=0.5,teacher=another"):
        with pytest.raises(UsageError, match="teacher=(self|another) must be dense or self, and needs distill"):
            Spec.read(line)


def test_every_committed_row_is_a_run_of_its_own():
    """The rows of docs/results, of any age: none is lost by the new names, and none is taken for another one."""
    rows = json_lines.read(Path(runs.__file__).resolve().parents[3] / "docs" / "results" / "quality.jsonl")
    assert len({runs.key_of(row) for row in rows}) == len(rows) >= 1704
    for row in rows:
        known = Spec(Spec.read(row["method"]).family, ()).settings
        assert set(row["settings"]) == set(known), row["method"]


ORPHANS = """
import time
from lp_dist.benchmarks.quality import runs
if __name__ == "__main__":
    with runs.workers(2) as pool:
        pool.submit(print, "at work", flush=True)
        for _ in range(4):
            pool.submit(time.sleep, 600)
"""


@pytest.mark.long
def test_workers_end_with_the_bench_even_if_it_is_killed(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    bench = subprocess.Popen([sys.executable, tmp_path / "orphans.py"], stdout=subprocess.PIPE, text=True)
    assert bench.stdout.readline() == "at work\n"
    bench.kill()
    bench.communicate(timeout=60)  # the output ends when nobody holds it any more


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--task", "words"], "chars, scratch, nanogpt or lm"),
        ([], "--text is missing"),
        (["--text", "a", "--task", "lm"], "needs a --model"),
        (["--text", "a", "--model", "b"], "--model is for"),
        (["--text", "a", "--sparsities", "half"], "must be numbers"),
        (["--text", "a", "--sparsities", "0.5 100"], "percents"),
        (["--text", "missing.txt"], "must be an existing file"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, word):
    result = CliRunner().invoke(app, ["bench", "quality", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 1 and word in str(
        result.exception.code if isinstance(result.exception, SystemExit) else result.output
    )


def test_the_tasks_are_what_they_are_called(tmp_path, tiny_model):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the line {i} of it\n" for i in range(400)))
    chars = tasks.chars(str(text))
    characters = text.read_text()
    assert len(chars.text.train) == len(characters) * 9 // 10 and len(chars.text.train) + len(
        chars.text.held_out
    ) == len(characters)
    x, y = chars.text.batch(torch.Generator().manual_seed(0), 3, 8)
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (3, 8)
    model = chars.build(0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.80e6, rel=0.02), "nanoGPT's CPU setting"
    larger = tasks.nanogpt(str(text), 50)
    assert sum(p.numel() for p in larger.build(0).parameters()) == pytest.approx(10.7e6, rel=0.02), (
        "and its GPU setting"
    )
    assert (larger.schedule.steps, larger.rows, larger.block, larger.build(0).config.resid_pdrop) == (50, 64, 256, 0.2)
    lm = tasks.lm(str(tiny_model), str(text), 30, 64)
    assert lm.schedule.steps == 30 and lm.evaluate(lm.build(0)) == pytest.approx(
        torch.tensor(384.0).log().item(), rel=0.1
    ), "random weights know nothing"
    with pytest.raises(UsageError, match="lower --block"):
        tasks.lm(str(tiny_model), str(text), 30, 10**6)
