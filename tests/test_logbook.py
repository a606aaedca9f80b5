"""What a run writes down: nothing twice, nothing torn, and a sentence when the loss is lost."""

import json

import pytest

from ada_jax import paths
from ada_jax.errors import UserError
from ada_jax.run import logbook


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
    assert logbook.summarise(steps) == {"loss": 2.0, "ssim_min": 0.25}


def test_a_loss_that_is_not_finite_names_its_step():
    good, bad = {"loss": 1.0}, {"loss": float("nan")}
    assert logbook.finite([good, good], 7, advice="rest") == [good, good]
    with pytest.raises(UserError, match=r"at step 6.*rest"):
        logbook.finite([good, bad, bad], 7, advice="rest")


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    paths.write_json(path, {"b": 1})
    with pytest.raises(TypeError):
        paths.write_json(path, {"b": object()})
    assert json.loads(path.read_text()) == {"b": 1}


def test_timer_counts_examples_and_waiting():
    timer = logbook.Timer(step=0, total=10, batch_size=4, show=False)
    with timer.waiting():
        pass
    lap = timer.lap(5)
    timer.close()
    assert lap["examples_per_second"] > 0
    assert 0 <= lap["input_wait_percent"] <= 100
