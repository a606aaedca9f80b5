"""The log of a run: no line twice, no torn line, and an error when the loss is not finite."""

import json
import re

import pytest
from absl import logging

from ada_jax import paths
from ada_jax.errors import UserError
from ada_jax.run import logbook, loop


def test_a_resumed_log_drops_what_will_be_written_again_and_a_torn_last_line(tmp_path):
    log = logbook.Logbook(str(tmp_path), step=0)
    for step in (10, 20, 30):
        log.write(step, "train", {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "kin')
    logbook.Logbook(str(tmp_path), step=20).close()
    assert logbook.read(str(tmp_path)) == [
        {"step": 10, "kind": "train", "loss": 0.1},
        {"step": 20, "kind": "train", "loss": 0.05},
    ]


@pytest.mark.parametrize("line", ['{"step": 20, "ki', '{"step": 20}', "7"])
def test_a_damaged_line_in_the_middle_stops_a_resume_and_loses_nothing(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 10, "kind": "train"}}\n{line}\n{{"step": 30, "kind": "train"}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl is damaged"):
        logbook.Logbook(str(tmp_path), step=40)
    assert path.read_bytes() == before


def test_a_killed_run_s_log_in_a_bucket_lacks_no_line_before_its_last_checkpoint(cloud):
    workdir = cloud.folder()
    log = logbook.Logbook(workdir, step=0)
    for step in (10, 20, 30, 40):
        log.write(step, "train", {"loss": 1 / step})
        if step == 30:
            log.flush()
    logbook.Logbook(workdir, step=20).close()
    assert [record["step"] for record in logbook.read(workdir)] == [10, 20]


def test_summary_takes_the_least_of_minima_and_the_mean_of_the_rest():
    steps = [{"loss": 1.0, "ssim_min": 0.5}, {"loss": 3.0, "ssim_min": 0.25}]
    assert loop.summarise(steps) == {"loss": 2.0, "ssim_min": 0.25}


def test_a_loss_that_is_not_finite_names_its_step():
    good, bad = {"loss": 1.0}, {"loss": float("nan")}
    assert loop.finite([good, good], 7, advice="rest") == [good, good]
    with pytest.raises(UserError, match=r"at step 6, where the metrics are loss nan;.*rest"):
        loop.finite([good, bad, bad], 7, advice="rest")


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    paths.write_json(path, {"b": 1})
    with pytest.raises(TypeError):
        paths.write_json(path, {"b": object()})
    assert json.loads(path.read_text()) == {"b": 1}


def test_progress_prints_one_line_an_interval_where_there_is_no_terminal(capsys):
    progress = logbook.Progress(step=0, total=10, batch_size=4)
    with progress.waiting():
        pass
    progress.skip_compilation(1)
    speed = progress.update(6, {"loss": 0.51234, "error": 12.5, "ada_changed": 0.0})
    progress.note(6, "eval", {"error": 3.2, "examples": 500})
    progress.close()
    assert speed["examples_per_second"] > 0
    assert 0 <= speed["input_wait_percent"] <= 100
    training, evaluation = capsys.readouterr().err.splitlines()
    pattern = r"step 6/10, loss 0\.5123, error 12\.5%, \d+ examples/s, 00:00 left"
    assert re.fullmatch(pattern, training)
    assert evaluation == "step 6/10, eval: error 3.2%"


def test_the_speed_is_that_of_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now[0])
    progress = logbook.Progress(step=0, total=10, batch_size=4, show=False)
    now[0] = 2.0
    with progress.paused():
        now[0] += 100
    assert progress.update(5, {}) == {"examples_per_second": 10, "input_wait_percent": 0}


def test_intervals_may_be_fractions_of_steps():
    assert [step for step in range(1, 11) if loop.is_due(step, 2.5)] == [3, 5, 8, 10]
    assert [step for step in range(1, 7) if loop.is_due(step, 3)] == [3, 6]
    assert not any(loop.is_due(step, 0) for step in range(1, 7))
    # 1.1 * 100 is a little more than 110.
    assert [step for step in range(1, 1101) if loop.is_due(step, 1.1 * 100)][::3] == [
        110,
        440,
        770,
        1100,
    ]


def test_all_metrics_and_messages_go_to_the_log_file(tmp_path):
    log = logbook.Logbook(str(tmp_path), step=0)
    log.write(10, "train", {"loss": 0.5, "ada_changed": 0.25})
    logging.warning("mind the step")
    log.close()
    logging.warning("after the end")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0].endswith("INFO step 10: train/ada_changed=0.25, train/loss=0.5")
    assert lines[1].endswith("WARNING mind the step") and len(lines) == 2
