import logging
import weakref
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.predictor import Conditions
from core.diffusion.sampling import Branch
from core.errors import ModelError
from core.sae.autoencoder import SaeId
from training.sae.stream import ActivationStream, StreamBatch, StreamConfig, _seed

DOWN, MIDDLE, UP = "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"
N_STEPS = 5
IDS = (SaeId(MIDDLE, "cond", 0.5), SaeId(DOWN, "uncond", 1.0), SaeId(MIDDLE, "cond", "all"))
CONFIG = StreamConfig(
    batch_size=24, images_per_buffer=4, batches_per_buffer=3, sampler_batch_size=2, num_inference_steps=N_STEPS, seed=7
)


class Words:
    """A prompt a word of the small model's."""

    WORDS = ("cat", "dog", "whale", "ship", "house", "tree", "sun")

    def prompt(self, number: int) -> str:
        return f"a {self.WORDS[number % len(self.WORDS)]}"


def a_stream(model: Diffuser, ids: tuple[SaeId, ...] = IDS, rank: int = 0, world: int = 1, **changes: Any) -> Any:
    config = StreamConfig(**{**vars(CONFIG), **changes})
    return ActivationStream(model, Words(), ids, config, rank=rank, world=world)


def take(stream: ActivationStream, n: int, start: int = 0) -> list[StreamBatch]:
    return list(islice(stream.batches(start), n))


def same(a: StreamBatch, b: StreamBatch) -> bool:
    return (a.number, a.prompts) == (b.number, b.prompts) and all(
        torch.equal(a.samples[i], b.samples[i]) for i in a.samples
    )


def updates_of(model: Diffuser, picture: int, hookpoint: str, branch: Branch) -> list[Tensor]:
    """Every update [H * W, C] of a picture, a step each, sampled without the stream."""
    with record(model, [hookpoint], branches=[branch]) as recording:
        for _ in model.sample(
            [Words().prompt(picture)], seeds=[_seed(CONFIG.seed, picture)], num_inference_steps=N_STEPS
        ):
            pass
    return [recording[ActivationKey(hookpoint, branch, step)][0].flatten(1).T for step in range(N_STEPS)]


def cells_of(samples: Tensor, updates: Tensor) -> list[int]:
    """Which rows of the updates the samples are."""
    nearest = torch.cdist(samples, updates, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-4
    return nearest.indices.tolist()


def test_batches_have_the_shapes_that_were_asked_for(model: Diffuser) -> None:
    stream = a_stream(model)
    (batch,) = take(stream, 1)
    assert (stream.d_in(DOWN), stream.d_in(MIDDLE)) == (16, 32)
    assert [tuple(batch.samples[i].shape) for i in IDS] == [(24, 32), (24, 16), (24, 32)]
    assert all(
        x.dtype == torch.float32 and x.is_contiguous() and bool(x.isfinite().all()) for x in batch.samples.values()
    )
    assert batch.prompts == ("a cat", "a dog", "a whale", "a ship")


def test_running_out_of_memory_draws_fewer_pictures_together_and_loses_none(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(model_folder, device="cpu")
    (before,) = take(a_stream(model, sampler_batch_size=4), 1)
    plain, sizes = model.predictor.call, []

    def predict(x: Tensor, *args: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 4 or len(sizes) == 4:  # too many; and once in the middle of a run
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(x, *args)

    model.predictor.call = predict  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "core"):
        (after,) = take(a_stream(model, sampler_batch_size=4), 1)
    assert sizes == [
        1,
        8,
        4,
        4,
        *[2] * 20,
    ]  # the shapes; four pictures, two, and then each of the four, five steps long
    assert [line.split(" with ", 1)[1] for line in caplog.messages] == ["a batch of 4; going on with 1"]
    assert before.prompts == after.prompts
    for sae_id in IDS:
        torch.testing.assert_close(after.samples[sae_id], before.samples[sae_id], rtol=1e-4, atol=1e-4)


def test_rows_are_updates_of_the_named_prompt_branch_and_step(model: Diffuser) -> None:
    (batch,) = take(a_stream(model), 1, start=3)  # the second round: pictures 4 to 7
    assert batch.prompts == ("a house", "a tree", "a sun", "a cat")
    for sae_id in IDS[:2]:
        steps = [updates_of(model, picture, sae_id.hookpoint, sae_id.branch) for picture in range(4, 8)]
        step = 2 if sae_id.t == 0.5 else 0
        for row, sample in enumerate(batch.samples[sae_id]):
            assert batch.prompt_of(row) == Words().prompt(4 + row % 4)
            cells_of(sample[None], steps[row % 4][step])


def test_a_round_holds_every_chosen_cell_once_and_batches_share_its_pictures_evenly(model: Diffuser) -> None:
    ids = (SaeId(MIDDLE, "cond", 0.0), SaeId(MIDDLE, "cond", "all"))
    whole = {"batch_size": 4 * 32, "batches_per_buffer": 2}  # 64 cells a picture: all there are at one step
    batches = take(a_stream(model, ids, **whole), 2)
    for picture in range(4):
        steps = updates_of(model, picture, MIDDLE, "cond")
        for sae_id, updates in zip(ids, (steps[-1], torch.cat(steps)), strict=True):
            of_image = torch.cat([batch.samples[sae_id][picture::4] for batch in batches])
            cells = cells_of(of_image, updates)
            assert len(cells) == len(set(cells)) == 64
            if sae_id.t == "all":
                assert {cell // 64 for cell in cells} == set(range(N_STEPS))
            else:
                assert cells != sorted(cells)


def test_time_shared_saes_can_see_fewer_steps(model: Diffuser) -> None:
    (batch,) = take(a_stream(model, IDS[2:], shared_steps=(3, 1)), 1)
    steps = updates_of(model, 0, MIDDLE, "cond")
    cells_of(batch.samples[IDS[2]][::4], torch.cat([steps[1], steps[3]]))


def test_a_batch_is_a_function_of_the_seed_and_its_number(model: Diffuser) -> None:
    batches = take(a_stream(model), 7)
    assert [batch.number for batch in batches] == list(range(7))
    for start in (1, 3, 5):
        resumed = take(a_stream(model), 2, start)
        assert all(same(a, b) for a, b in zip(resumed, batches[start:], strict=False))
    other = take(a_stream(model, seed=8), 1)[0]
    assert not same(other, batches[0])
    alone = take(a_stream(model, IDS[:1]), 2)  # nor do the other SAEs matter
    assert all(torch.equal(a.samples[IDS[0]], b.samples[IDS[0]]) for a, b in zip(alone, batches, strict=False))
    at_once = take(a_stream(model, sampler_batch_size=3), 1)[0]
    torch.testing.assert_close(at_once.samples, batches[0].samples)


def test_processes_share_the_batches_of_one(model: Diffuser) -> None:
    one = take(a_stream(model, sampler_batch_size=1), 4)
    two = [take(a_stream(model, rank=rank, world=2, sampler_batch_size=1), 4) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        assert set(parts[0].prompts).isdisjoint(parts[1].prompts)
        for rank, part in enumerate(parts):
            assert part.prompts == whole.prompts[rank::2]
            assert all(torch.equal(part.samples[i], whole.samples[i][rank::2]) for i in IDS)


def test_no_later_step_and_no_later_block_is_run(model: Diffuser) -> None:
    stream = a_stream(model, (SaeId(MIDDLE, "cond", 0.75), SaeId(DOWN, "cond", 1.0)))
    calls, ups = model.n_unet_calls, []
    handle = model.unet.get_submodule(UP).register_forward_hook(lambda *_: ups.append(model.step_context))
    take(stream, 3)
    handle.remove()
    assert model.n_unet_calls - calls == 2 * 2  # twice two pictures, steps 0 and 1
    assert [step_context.step for step_context in ups if step_context is not None] == [
        0,
        0,
    ]  # the last call ends in the middle
    assert not model._lock.is_held


def test_the_model_is_free_between_rounds(model: Diffuser) -> None:
    batches = a_stream(model).batches()
    next(batches)
    assert not model._lock.is_held
    batches.close()


def test_memory_stays_within_what_is_told(model: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = a_stream(model)
    pools: list[list[weakref.ref[Tensor]]] = []
    make = stream._fill_buffer

    def watched(number: int) -> Any:
        assert all(pool() is None for one in pools for pool in one)  # the last round is gone
        pool, prompts = make(number)
        assert sum(cells.nbytes for cells in pool.values()) == stream.buffer_bytes
        pools.append([weakref.ref(cells) for cells in pool.values()])
        return pool, prompts

    monkeypatch.setattr(stream, "_fill_buffer", watched)
    kept = take(stream, 7)
    assert len(pools) == 3
    assert all(x.untyped_storage().nbytes() == x.nbytes for batch in kept for x in batch.samples.values())
    assert stream.buffer_bytes == 4 * 18 * (32 + 16 + 32) * 4
    assert a_stream(model, world=2).buffer_bytes == stream.buffer_bytes / 2
    with pytest.raises(ValueError, match=r"more than max_buffer_gib 1e-06\. Lower batches_per_buffer"):
        a_stream(model, max_buffer_gib=1e-6)


def test_nan_can_be_traced_to_its_prompt(model: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = model.encode_text

    def broken(texts: list[str]) -> Conditions:
        added = torch.tensor([torch.nan if "whale" in text else 0 for text in texts])
        return Conditions({name: values + added[:, None, None] for name, values in encode(texts).tensors.items()})

    monkeypatch.setattr(model, "encode_text", broken)
    (batch,) = take(a_stream(model, IDS[:1]), 1)
    rows = batch.samples[IDS[0]].isnan().any(1).nonzero().flatten().tolist()
    assert {batch.prompt_of(row) for row in rows} == {"a whale"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ()}, "each once; given: none"),
        ({"ids": (IDS[0], IDS[0])}, "each once; given: mid_block"),
        ({"batch_size": 25}, "batch_size 25 must be a multiple of images_per_buffer 4"),
        ({"batches_per_buffer": 0}, "at least 1"),
        ({"world": 3}, "3 processes cannot share 4 images"),
        ({"rank": 2, "world": 2}, "2 processes cannot share"),
        ({"guidance_scale": 1.0}, "runs no uncond branch"),
        ({"shared_steps": (4, 5)}, "between 0 and 4"),
        ({"batches_per_buffer": 11}, r"cond/t0.5 has 64 cells an image; .* want 66 of each of 4"),
        ({"ids": (SaeId(MIDDLE, "cond", 1.5),)}, "between 0 .* not at 1.5"),
        ({"ids": (SaeId("mid_block", "cond", "all"),)}, "'mid_block' is no .* Its blocks are: down_blocks"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_say_why(model: Diffuser, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        a_stream(model, **changes)
    assert isinstance(error.value, ModelError) == ("Its blocks" in message)
    assert not model._lock.is_held
