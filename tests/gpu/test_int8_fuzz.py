"""500 random calls of the INT8 rungs, through the public function, whichever kernel serves them."""

import pytest
import torch

from int8_workers import run_random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.evidence("int8"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]

CASES, CASES_PER_TEST = 500, 20


@pytest.fixture(scope="module")
def results(workers):
    """All cases, on all cores: most of the time goes into compiling."""
    return workers.starmap(run_random_case, [(number, "cuda") for number in range(CASES)], chunksize=1)


@pytest.mark.parametrize("first", range(0, CASES, CASES_PER_TEST))
def test_random_calls_agree_with_the_reference(results, within, first):
    for description, wrong, error, bound in results[first : first + CASES_PER_TEST]:
        assert wrong is None, description
        print(description, error, bound)
        within(error, bound)
