"""What half precision does to a measurement, on predictions whose rounding is known, and on the small model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.predictor import Conditions
from core.diffusion.schedule import NoiseSchedule
from core.information import measuring
from core.information.attribution import attribute, attribute_iter
from core.information.estimator import Comparison
from core.information.rounding import Rounding

APART, PROMPT = 0.5, "a cat"


class Rounded:
    """Predicts a constant for each text, which half precision gets wrong by a known amount for one of them."""

    schedule = NoiseSchedule.stable_diffusion()
    latent_shape = (1, 2, 2)
    device = torch.device("cpu")

    def __init__(self, wrong: float) -> None:
        self.wrong, self.dtype, self.asked = wrong, torch.float16, list[torch.dtype]()

    def busy(self) -> Any:
        return nullcontext()

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        self.dtype = torch.float32
        yield
        self.dtype = torch.float16

    def encode_text(self, texts: Sequence[str]) -> Conditions:
        return Conditions({"cat": torch.tensor([[float("cat" in text)] for text in texts])})

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        del log_snr
        has_cat = conditions.tensors["cat"]
        self.asked.append(self.dtype)
        # Both texts are wrong by 9 alike, which is nothing between them.
        error = 9 + self.wrong * has_cat if self.dtype == torch.float16 else torch.zeros_like(has_cat)
        return torch.zeros_like(x) + (APART * has_cat + error)[:, :, None, None]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_floor_is_what_rounding_alone_puts_between_two_texts(batch_size: int) -> None:
    model = Rounded(0.1)
    rounding = Rounding(model, torch.zeros(1, 2, 2), [Comparison("a", "a cat")], seed=0, batch_size=batch_size)
    assert len(list(rounding.run())) == len(model.asked)
    assert rounding.share == pytest.approx((0.1 / APART) ** 2, rel=1e-4)
    assert rounding.n_evals == 16  # four noise samples, two texts, two precisions
    assert model.dtype == torch.float16


@pytest.mark.parametrize(("wrong", "dtype"), [(0.1, "float16"), (0.12, "float32")])
def test_a_measurement_goes_over_to_float32_where_the_floor_is_above_a_twentieth(wrong: float, dtype: str) -> None:
    model = Rounded(wrong)
    events = list(attribute_iter(model, torch.zeros(1, 2, 2), PROMPT, words=["cat"]))
    result: Any = events[-1]
    assert result.settings["dtype"] == dtype
    assert result.settings["rounding"] == pytest.approx((wrong / APART) ** 2, rel=1e-4)
    assert model.asked[-1] == getattr(torch, dtype)
    assert model.dtype == torch.float16
    assert all(event.expected_evals <= event.max_evals for event in events[:-1])
    assert result.n_evals == events[-2].n_evals == 16 + result.n_replicates * 16
    seen = APART + (wrong if dtype == "float16" else 0)
    width = np.diff(result.settings["log_snr_range"])[0]
    assert result.bits[0] == pytest.approx(0.5 * 4 * seen**2 * width / np.log(2), rel=1e-3)


def test_a_narrow_model_measures_what_its_weights_do_in_float32_and_keeps_them(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MAX_ROUNDING_SHARE", 0.0)
    narrow = load_model(model_folder, device="cpu", dtype="bfloat16")
    before = {name: weight.clone() for name, weight in narrow.unet.state_dict().items()}
    latents = torch.randn(1, *narrow.latent_shape, generator=torch.Generator().manual_seed(0))
    measured = attribute(narrow, latents, PROMPT, max_evals=192)
    assert measured.settings["dtype"] == "float32"
    assert 0 < measured.settings["rounding"] < 1
    assert narrow.dtype == torch.bfloat16
    for name, weight in narrow.unet.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[name])
    with narrow.in_float32():
        wide = attribute(narrow, latents, PROMPT, max_evals=192)
    np.testing.assert_array_equal(measured.maps, wide.maps)
    assert "rounding" not in wide.settings


def test_closing_in_the_middle_leaves_the_model_narrow_and_free(model_folder: Path) -> None:
    narrow: Diffuser = load_model(model_folder, device="cpu", dtype="bfloat16")
    latents = torch.zeros(1, *narrow.latent_shape)
    for n in (1, 3, 6):  # in the narrow half of the check, in its wide half, and in the measurement
        run = attribute_iter(narrow, latents, PROMPT, batch_size=12)
        for _ in range(n):
            next(run)
        run.close()
        assert narrow.dtype == narrow.unet.dtype == torch.bfloat16
        assert not narrow._lock.locked()
