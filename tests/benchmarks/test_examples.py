import doctest

import pytest

from benchmarks import contention, growth, memory, overhead, paired, report


@pytest.mark.parametrize(
    "module", [contention, growth, memory, overhead, paired, report], ids=lambda m: m.__name__
)
def test_the_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
