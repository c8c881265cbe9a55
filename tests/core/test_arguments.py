import numpy as np
import pytest
import torch

from core.arguments import as_items, as_seed


def test_a_text_is_one_item_and_never_its_letters() -> None:
    assert as_items("cat") == ("cat",)
    assert as_items(["cat", "dog"]) == ("cat", "dog")
    assert as_items(name for name in ("cat",)) == ("cat",)
    assert as_items(3) == (3,)


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint8(7), 7.0, torch.tensor(7), np.array(7)])
def test_a_seed_is_any_whole_number(seed: object) -> None:
    assert type(as_seed(seed)) is int
    assert as_seed(seed) == 7
    assert as_seed(2**64 - 1) == 2**64 - 1


@pytest.mark.parametrize("seed", [-1, 2**64, 10**400, None, "7", 7.5, True, float("nan"), float("inf"), [7]])
def test_anything_else_is_named(seed: object) -> None:
    with pytest.raises(ValueError, match=r"A seed is a whole number from 0 to 2\*\*64 - 1, not '"):
        as_seed(seed)
