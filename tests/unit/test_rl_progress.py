"""What the terminal shows of an online run."""

import io
import json
import time

from verl_dft.training.online.progress import Progress, last_error, step_line


def test_a_step_is_one_line():
    metrics = {"step": 3, "rows/self_reward": 0.71875, "rows/expert_frac": 0.0, "actor/pg_loss": -0.00214,
               "actor/grad_norm": 0.143, "timing_s/step": 2.354}  # fmt: skip
    assert step_line(metrics, 20) == "step 3/20: reward 0.719, loss -0.0021, grad norm 0.143, 2.4 s"
    assert step_line({**metrics, "rows/expert_frac": 0.125}, None).startswith("step 3: reward 0.719, expert 12%, ")


def wait_for(text, out):
    deadline = time.monotonic() + 10
    while text not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    return out.getvalue()


def test_steps_are_shown_once_as_they_come(tmp_path):
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    line = lambda step: json.dumps({"step": step, "rows/self_reward": step / 10, "timing_s/step": 1.0}) + "\n"  # noqa: E731
    path.write_text(line(1) + line(2) + line(3))  # of an earlier start, which is gone on from step 1
    with Progress(tmp_path, 4, 1, out):
        new = tmp_path / "new"
        new.write_text(line(1))
        new.rename(path)
        file = open(path, "a")  # noqa: SIM115
        file.write(line(2) + json.dumps({"step": 2, "val/acc": 1.0}) + "\n" + line(3)[:20])
        file.flush()
        assert wait_for("step 2/4", out).count("step") == 1
        file.write(line(3)[20:])
        file.flush()
        assert wait_for("step 3/4", out).splitlines() == [
            "step 2/4: reward 0.200, 1.0 s",
            "step 3/4: reward 0.300, 1.0 s",
        ]
        file.write(line(4))  # just before the end
        file.close()
    assert out.getvalue().splitlines()[-1] == "step 4/4: reward 0.400, 1.0 s" and len(out.getvalue().splitlines()) == 3


def test_no_file_yet(tmp_path):
    out = io.StringIO()
    with Progress(tmp_path, None, out=out):
        pass
    assert not out.getvalue()


def test_the_last_error_of_this_start(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("error: of an earlier start\n")
    start = log.stat().st_size
    assert last_error(log, start) is None
    with open(log, "a") as file:
        file.write("noise\nerror: first\nmore error: inside a line\nerror: second\nafter\n")
    assert last_error(log, start) == "second"
