import numpy as np
import torch

from training.picturebook.models.denoiser import DenoiserConfig, DenoiserLoss, TextLoss, turn_relations
from training.picturebook.models.latents import WORDINGS, Latents, draw_batch, draw_captions, tokenize
from training.picturebook.world.scenes import layout_of, make_scene, paint
from training.picturebook.world.world import LABELS, OBJECTS

CONFIG = DenoiserConfig(block_out_channels=(16, 32), n_heads=(1, 1), text_width=32, text_layers=2)


def latents(n: int = 50) -> Latents:
    """Tellings that say which half they are of."""
    tokens = torch.zeros(n, WORDINGS, 24, dtype=torch.int16)
    tokens[:, WORDINGS // 2 :] = 1
    return Latents(torch.zeros(n, 2, 4, 4).half(), tokens, torch.zeros(n, 4, 4, dtype=torch.uint8))


def test_words_are_left_out_most_where_the_picture_shows_most() -> None:
    batch = draw_batch(latents(), 0, 20_000, 1000)
    dropped, times = batch["tokens"][:, 0].float(), batch["timesteps"]
    assert abs(float(dropped[times < 50].mean()) - 0.69) < 0.05
    assert abs(float(dropped[times >= 950].mean()) - 0.31) < 0.05
    assert not draw_captions(latents(), 0, 500)["tokens"].any()


def test_noisy_timesteps_get_their_share_and_the_rest_is_even() -> None:
    for noisy in (0.0, 0.4):
        times = draw_batch(latents(), 0, 30_000, 1000, noisy)["timesteps"].double()
        assert 0 <= times.min() < 10
        assert 990 < times.max() <= 999
        expected = noisy + (1 - noisy) / 3
        assert abs(float((times >= 667).double().mean()) - expected) < 0.01
        assert abs(float((times < 333).double().mean()) - (1 - noisy) / 3) < 0.01


def test_samples_that_are_moved_to_noise_come_from_the_rows_named() -> None:
    data = latents(10)
    data.layout[3] = 7
    batch = draw_batch(data, 0, 30_000, 1000, 0.4, placed=torch.tensor([3]))
    of_three, late = batch["layout"][:, 0, 0] == 7, batch["timesteps"] >= 667
    assert abs(float(of_three[late].double().mean()) - (0.4 + 0.2 / 10) / 0.6) < 0.02
    assert abs(float(of_three[~late].double().mean()) - 0.1) < 0.02


def test_turning_relations_twice_changes_nothing() -> None:
    texts = ["a cat left of a dog", "a boat above a house on the grass", "a cat and a dog"]
    tokens = tokenize(texts)
    turned = turn_relations(tokens)
    assert torch.equal(turned, tokenize(["a cat right of a dog", "a boat below a house on the grass", texts[2]]))
    assert torch.equal(turn_relations(turned), tokens)


def test_the_layout_is_where_things_are_painted() -> None:
    for seed in range(20):
        scene = make_scene(seed)
        labels, layout = paint(scene).labels, layout_of(scene)
        cells = np.kron(layout, np.ones((8, 8), np.uint8))
        on_objects = labels < len(OBJECTS)
        assert (cells[on_objects] == labels[on_objects]).all()
        assert set(np.unique(layout)) - {len(OBJECTS)} == {LABELS.index(box.object_name) for box in scene.boxes}


def test_the_text_encoder_learns_what_stands_left() -> None:
    """Two captions, told apart by their relation alone, and the layouts that they tell."""
    torch.manual_seed(0)
    tokens = tokenize(["a cat left of a dog", "a cat right of a dog"])
    layout = torch.full((2, 4, 4), len(OBJECTS))
    layout[0, :, :2], layout[1, :, 2:] = 0, 1
    loss = TextLoss(CONFIG, 4)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss(tokens, layout).backward()
        optimizer.step()
    loss.requires_grad_(False)
    assert float(loss(tokens, layout)) < 0.1
    assert float(loss(turn_relations(tokens), layout)) > 1


def test_the_layout_is_asked_of_the_text_encoder_alone_and_in_training_alone() -> None:
    torch.manual_seed(0)
    loss = DenoiserLoss(CONFIG, 2, 4)
    batch = draw_batch(latents(), 0, 4, 1000)
    without = loss.eval()(**batch)
    with_layout = loss.train()(**batch)
    assert with_layout > without
    (with_layout - loss.eval()(**batch)).backward()
    assert all(p.grad is None or not p.grad.abs().max() > 1e-6 for p in loss.unet.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in loss.text_encoder.parameters())
