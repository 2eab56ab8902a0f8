import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.sign_majority import sign_majority, sign_majority_reference
from freemerge.testing import FLOATS, random_array


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n):
    arguments = random_array(n, dtype, seed=0), [random_array(n, dtype, seed=t) for t in (1, 2)], [0.8, 0.0]
    assert implementation("sign_majority", arguments[0])(*arguments) == sign_majority_reference(*arguments)


def test_by_hand():
    base = np.zeros(5, np.float32)
    experts = [np.array(column, np.float32) for column in ([3, 1, 0, -1, 2], [-1, 1, 0, 1, -2])]
    assert sign_majority(base, experts, [0.0, 0.0]) == 2
    assert sign_majority(base, experts, [2.0, 1.0]) == 3  # 2, 1, 0, 1, 0


def test_rejects_another_number_of_floors():
    with pytest.raises(ShapeError, match="2 floors for 1 experts"):
        sign_majority(np.zeros(3, np.float32), [np.zeros(3, np.float32)], [0.0, 0.0])
