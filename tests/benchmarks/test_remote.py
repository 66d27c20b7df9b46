import pytest

from benchmarks.remote import remote_step
from benchmarks.twins import Workload
from stability_probe.runs import TrainConfig

TINY = Workload("tiny", TrainConfig(model="theory-unet", n_skips=2), (4, 1, 2, 2))


@pytest.mark.slow
def test_a_step_is_taken_in_another_process(tmp_path):
    with remote_step(TINY, "hooks that keep activations", tmp_path) as step:
        assert step() > 0
        assert step() > 0


@pytest.mark.slow
def test_a_process_that_has_failed_is_told(tmp_path):
    with (
        remote_step(TINY, "no such variant", tmp_path) as step,
        pytest.raises(RuntimeError, match="no such variant: its process has ended"),
    ):
        step()
