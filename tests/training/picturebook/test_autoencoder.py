"""The autoencoder's crops: cut where they say they are, from scenes that each batch's number decides."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from training.picturebook.models import latents
from training.picturebook.models.autoencoder import AutoencoderConfig, CropSource, build_autoencoder, to_pixels
from training.picturebook.models.latents import compute_latents, load_latents
from training.picturebook.models.painting import PaintedScenes
from training.picturebook.world.backgrounds import SIZE
from training.picturebook.world.scenes import CELL
from training.picturebook.world.world import OBJECTS

N_CELLS = SIZE // CELL


@pytest.fixture
def scenes(tmp_path: Path) -> PaintedScenes:
    """192 scenes whose pixels say where they are, with one object each, two cells wide, at the scene's own place."""
    made = PaintedScenes(tmp_path, 192)
    made.images[..., 0] = np.arange(192)[:, None, None]
    made.images[..., 1], made.images[..., 2] = np.arange(SIZE)[:, None], np.arange(SIZE)
    made.layout[:] = len(OBJECTS)
    for row in range(192):
        y, x = divmod(row, N_CELLS)
        made.layout[row, y : y + 2, x : x + 2] = 0
    return made


@pytest.fixture
def source(scenes: PaintedScenes, monkeypatch: pytest.MonkeyPatch) -> CropSource:
    for name, value in (("FIRST", 64), ("PER_BATCH", 8), ("BLOCK", 32)):
        monkeypatch.setattr(CropSource, name, value)
    return CropSource(scenes, 64, torch.device("cpu"))


def test_crops_lie_on_the_grid_and_most_of_them_around_an_object(source: CropSource) -> None:
    pixels = ((source(100, 3000)["pixels"] + 1) * 127.5).round().long()
    rows, y, x = pixels[:, 0, 0, 0], pixels[:, 1, 0, 0], pixels[:, 2, 0, 0]
    assert (pixels[:, 0] == rows[:, None, None]).all()
    assert (pixels[:, 1] == y[:, None, None] + torch.arange(64)[:, None]).all()
    assert (pixels[:, 2] == x[:, None, None] + torch.arange(64)).all()
    assert set(y.tolist()) == set(x.tolist()) == set(range(0, SIZE - 64 + 1, CELL))
    assert len(set(rows.tolist())) == 192
    top, left = rows // N_CELLS * CELL, rows % N_CELLS * CELL
    centred = ((y - (top - 24).clamp(0, 64)).abs() <= CELL) & ((x - (left - 24).clamp(0, 64)).abs() <= CELL)
    assert 0.74 < float(centred.double().mean()) < 0.9  # of the other quarter some are, by chance


def test_a_batch_depends_on_its_number_and_not_on_what_is_painted(
    source: CropSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(source.scenes, "wait", waited.append)
    batches = [source(number, 64)["pixels"] for number in (0, 3, 4, 8, 50)]
    assert waited == [64, 64, 96, 128, 192]
    for number, n_known in ((0, 64), (4, 96)):
        seen = ((source(number, 2000)["pixels"][:, 0] + 1) * 127.5).round().unique()
        assert seen.tolist() == list(range(n_known))
    again = CropSource(source.scenes, 64, torch.device("cpu"))
    assert torch.equal(again(8, 64)["pixels"], batches[3])  # as a resumed run asks for it, first of all


def test_scenes_are_copied_to_a_device_as_they_are_needed(source: CropSource) -> None:
    copied = CropSource(source.scenes, 64, torch.device("cpu"))
    copied._images, copied._layout = torch.zeros_like(copied._images), torch.zeros_like(copied._layout)
    copied._n_copied = 0
    for number in (0, 1, 4, 20):
        assert torch.equal(copied(number, 32)["pixels"], source(number, 32)["pixels"])
        assert copied._n_copied == source._known(number)
        assert not copied._images[copied._n_copied :].any()


def test_latents_are_encoded_again_only_where_something_has_changed(
    scenes: PaintedScenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(AutoencoderConfig(block_out_channels=(16, 16, 16, 16))).eval()
    monkeypatch.setattr(latents, "SHARD", 64)
    encoded: list[int] = []

    def counted(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        del autoencoder
        encoded.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, CELL).contiguous()

    monkeypatch.setattr(latents, "_encode", counted)
    folder = tmp_path / "latents"
    compute_latents(autoencoder, scenes, folder, "train")
    assert encoded == [64, 64, 64]
    data = load_latents(folder, "train")
    assert torch.equal(data.tokens, torch.from_numpy(np.array(scenes.tokens)))
    pooled = torch.nn.functional.avg_pool2d(to_pixels(scenes.images[100]), CELL)
    torch.testing.assert_close(data.latents[100].float(), pooled, atol=1e-3, rtol=0)
    compute_latents(autoencoder, scenes, folder, "train")
    assert len(encoded) == 3
    scenes.tokens[70] = 1  # other texts
    compute_latents(autoencoder, scenes, folder, "train")
    assert len(encoded) == 4
    autoencoder.quant_conv.bias.data += 1  # another autoencoder
    compute_latents(autoencoder, scenes, folder, "train")
    assert len(encoded) == 7
    shorter = PaintedScenes(tmp_path, 128)
    compute_latents(autoencoder, shorter, folder, "train")
    assert len(encoded) == 7
    assert len(load_latents(folder, "train").tokens) == 128
