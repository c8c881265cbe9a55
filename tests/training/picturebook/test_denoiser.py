import numpy as np
import torch
from PIL import Image

from training.picturebook.models.denoiser import (
    DenoiserConfig,
    DenoiserLoss,
    DenoiserTask,
    TextLoss,
    find_layout_rows,
    turn_relations,
)
from training.picturebook.models.latents import Latents, LayoutRows, draw_batch, draw_captions
from training.picturebook.models.painting import WORDINGS, tokenize
from training.picturebook.world.scenes import caption_of, layout_of, make_scene, paint
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
    data.layout[3], data.layout[5] = 7, 8
    rows = LayoutRows(placed=torch.tensor([3]), crowded=torch.tensor([5]))
    batch = draw_batch(data, 0, 30_000, 1000, noisy=0.4, crowded=0.25, layout_rows=rows)
    late = batch["timesteps"] >= 667
    for label, share in ((7, 0.3), (8, 0.1)):
        seen = (batch["layout"][:, 0, 0] == label).double()
        assert abs(float(seen[late].mean()) - (share + 0.2 / 10) / 0.6) < 0.02
        assert abs(float(seen[~late].mean()) - 0.1) < 0.02
        # Wherever in the noisiest third: not one group's rows at its end.
        assert abs(float(seen[late & (batch["timesteps"] > 900)].mean()) - (share + 0.2 / 10) / 0.6) < 0.03


def test_captions_that_say_most_of_the_layout_are_found_by_their_words() -> None:
    texts = [
        "a cat left of a dog",
        "a cat and a dog",
        "a boat, a hound and a bat on the grass",
        "a pine above a ship",
        "",
    ]
    rows = find_layout_rows(tokenize(texts))
    assert rows.placed.tolist() == [0, 3]
    assert rows.crowded.tolist() == [2]


def test_three_objects_have_their_share_where_layout_is_decided() -> None:
    """One caption in seven names three objects; of the noisiest third of the samples, three in ten."""
    captions = [caption_of(make_scene(seed)) for seed in range(600)]
    tokens = tokenize([caption.text for caption in captions])[:, None].expand(-1, WORDINGS, -1).short()
    data = Latents(torch.zeros(600, 1, 1, 1), tokens, torch.zeros(600, 1, 1, dtype=torch.uint8))
    for row, caption in enumerate(captions):
        data.layout[row] = len(caption.words) + 10 * (caption.story.relation is not None)
    maker = DenoiserTask(CONFIG, data, data, draw=lambda _: Image.new("RGB", (1, 1))).batch_maker(20_000)
    batch = maker(0)
    kind, late = batch["layout"].flatten(), batch["timesteps"] >= 667
    among = sum(len(caption.words) == 3 for caption in captions) / 600
    expected = (CONFIG.noisy * CONFIG.crowded + (1 - CONFIG.noisy) / 3 * among) / (
        CONFIG.noisy + (1 - CONFIG.noisy) / 3
    )
    assert 0.28 < expected < 0.36
    assert abs(float((kind[late] == 3).double().mean()) - expected) < 0.02
    assert abs(float((kind[~late] == 3).double().mean()) - among) < 0.02
    assert float((kind[late] > 10).double().mean()) > 0.45


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
