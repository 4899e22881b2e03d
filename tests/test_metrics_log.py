"""The metrics file: one line an entry, cut back where a run goes on, completed after an error."""

import errno
import os

import pytest

from distilbert_jax.errors import UserError
from distilbert_jax.training.metrics_log import MetricsLog, read_metrics


def entries(output):
    return [(line["step"], line["tokens_seen"], line["loss"]) for line in read_metrics(output)]


def test_a_continuation_keeps_what_was_before_it(tmp_path):
    with MetricsLog(tmp_path, start=0, seen=0) as log:
        for step in (1, 2, 3):
            log.count(10.0)
            log.write(step, {"loss": float(step)})
        assert log.tokens_per_second > 0
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "tok')  # cut off
    seconds = read_metrics(tmp_path)[1]["seconds"]
    with MetricsLog(tmp_path, start=2, seen=20) as log:
        assert entries(tmp_path) == [(1, 10, 1.0), (2, 20, 2.0)]
        log.write(3, {"loss": 4.0})
    assert entries(tmp_path)[2:] == [(3, 20, 4.0)]
    assert read_metrics(tmp_path)[2]["seconds"] >= seconds
    with MetricsLog(tmp_path, start=0, seen=0):
        assert entries(tmp_path) == []


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk(policy, tmp_path, capfd):
    """Half a line is written before it is full; the rest follows when there is room again."""
    class Full:
        def write(self, content):
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            full.append(True)
            return file.write(content[:5])

    with MetricsLog(tmp_path, 0, 0, policy) as log:
        file, full = log._file, []
        log._file = Full()
        said = f"{tmp_path / 'metrics.jsonl'} cannot be written (No space left on device)"
        if policy == "stop":
            with pytest.raises(UserError) as error:
                log.write(1, {"loss": 1.0})
            assert str(error.value) == f"{said}; when there is room, the same command goes on"
        else:
            log.write(1, {"loss": 1.0})
            assert capfd.readouterr().err == f"{said}\n"
        assert entries(tmp_path) == []
        log._file = file
        log.write(2, {"loss": 2.0})
    assert entries(tmp_path) == [(1, 0, 1.0), (2, 0, 2.0)]


def test_lines_of_another_form_are_passed_over(tmp_path):
    whole = '{"step": 1, "tokens_seen": 2, "seconds": 3.0}'
    (tmp_path / "metrics.jsonl").write_text(f'[]\n{whole}\n{{"step": 2}}\n3\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
