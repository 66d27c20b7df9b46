"""One process among others, or alone."""

import os

import pytest
from torch import distributed

from stability_probe.errors import StabilityProbeError
from stability_probe.runs.processes import from_all, from_main, is_main, join, leave


def refuse():
    raise StabilityProbeError("the folder is full")


class TestAlone:
    def test_is_the_main_one_and_asks_nobody(self):
        assert join().num_processes == 1
        assert is_main()
        assert from_main(lambda: 3) == 3
        assert from_all([1]) == [[1]]
        leave()

    def test_errors_are_raised_as_they_are(self):
        with pytest.raises(StabilityProbeError, match="the folder is full"):
            from_main(refuse)


def rank():
    return int(os.environ["RANK"])


def agree():
    """What processes without a GPU agree on, as `torchrun` starts them."""
    assert not distributed.is_initialized()
    assert join().num_processes == 2
    assert is_main() == (rank() == 0)
    called = []
    assert from_main(lambda: called.append(rank()) or {"from": rank()}) == {"from": 0}
    assert called == [0][rank() :]
    assert from_all(10 * rank()) == [0, 10]
    with pytest.raises(StabilityProbeError, match="the folder is full"):
        from_main(refuse)
    assert from_all(rank()) == [0, 1]  # and nobody is out of step
    leave()
    assert not distributed.is_initialized()
    leave()


@pytest.mark.slow
def test_two_processes(forks):
    ended = forks.call(agree, processes=2)
    assert ended.codes == (0, 0), ended.told
