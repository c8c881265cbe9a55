from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.activations.hooks import ActivationKey, edit, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import SamplerState
from core.errors import ModelError

PROMPTS = ["a cat on the grass", "a ship in the sea", "a dog"]
DOWN, MIDDLE, UP = "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"


@pytest.fixture(autouse=True)
def left_as_found(model: Diffuser) -> Iterator[None]:
    """Whatever a test does, the model is free and unhooked after it."""
    yield
    assert not model._lock.is_held
    assert model.step_context is None
    assert n_hooks(model) == 0


def n_hooks(model: Diffuser) -> int:
    return sum(len(module._forward_hooks) for module in model.unet.modules())


def sample(model: Diffuser, n: int = 2, steps: int = 3, **settings: Any) -> SamplerState:
    *_, last = model.sample(PROMPTS[:n], seeds=list(range(n)), num_inference_steps=steps, **settings)
    return last


def test_an_update_is_the_blocks_output_minus_its_input(model: Diffuser) -> None:
    by_hand: dict[str, list[Tensor]] = {name: [] for name in model.hookpoints}
    handles = [
        model.unet.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: by_hand[name].append(output[0] - args[0])
        )
        for name in model.hookpoints
    ]
    with record(model) as recording:
        sample(model, n=3, steps=2)
    for handle in handles:
        handle.remove()
    assert len(recording) == 3 * 2 * 2
    for name, updates in by_hand.items():
        for step, whole in enumerate(updates):
            uncond, cond = whole.chunk(2)  # diffusers puts the empty text first
            assert torch.equal(recording[ActivationKey(name, "uncond", step)], uncond)
            assert torch.equal(recording[ActivationKey(name, "cond", step)], cond)
    assert recording[ActivationKey(DOWN, "cond", 0)].shape == (3, 16, 16, 16)
    assert recording[ActivationKey(MIDDLE, "cond", 0)].shape == (3, 32, 8, 8)
    assert all(bool(update.abs().max() > 0) for update in recording.values())


def test_the_branches_are_told_apart(model: Diffuser) -> None:
    with record(model, [MIDDLE], steps=[0]) as both:
        sample(model)
    with record(model, [MIDDLE], steps=[0]) as alone:
        sample(model, guidance_scale=1.0)
    assert list(alone) == [(MIDDLE, "cond", 0)]
    torch.testing.assert_close(both[ActivationKey(MIDDLE, "cond", 0)], alone[ActivationKey(MIDDLE, "cond", 0)])
    assert not torch.allclose(both[ActivationKey(MIDDLE, "uncond", 0)], alone[ActivationKey(MIDDLE, "cond", 0)])


def test_steps_are_right_run_after_run(model: Diffuser) -> None:
    met: list[tuple[ActivationKey, int]] = []
    with record(model, [UP], branches=["cond"], sink=lambda key, x: met.append((key, len(x)))) as recording:
        sample(model, n=1, steps=2)
        given_up = model.sample(PROMPTS[:1], seeds=[0], num_inference_steps=4)
        next(given_up)
        given_up.close()  # shifts no later step
        sample(model, n=3, steps=3)
    steps = [(key.step, n) for key, n in met]
    assert steps == [(0, 1), (1, 1), (0, 1), (0, 3), (1, 3), (2, 3)]
    assert len(recording) == 0  # a sink keeps nothing


def test_only_what_is_wanted_is_kept_and_nothing_larger_with_it(model: Diffuser) -> None:
    with record(model, [MIDDLE, DOWN, MIDDLE], branches=["uncond"], steps=[0, 2]) as recording:
        sample(model)
    assert set(recording) == {(name, "uncond", step) for name in (DOWN, MIDDLE) for step in (0, 2)}
    for update in recording.values():
        assert not update.requires_grad
        assert update.untyped_storage().nbytes() == update.nbytes
    with pytest.raises(KeyError, match=r"'cond', 0\) was not recorded; there are: \('down_blocks"):
        recording[ActivationKey(DOWN, "cond", 0)]


def test_recording_computes_one_subtraction_an_update(model: Diffuser) -> None:
    class Counting(TorchDispatchMode):
        """Operations that make tensors; views cost nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.met: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.met[func.overloadpacket.__name__] += not func.is_view
            return func(*args, **(kwargs or {}))

    with Counting() as plain:
        sample(model)
    with Counting() as recorded, record(model) as recording:
        sample(model)
    assert recorded.met - plain.met == {"sub": len(recording)}


def test_a_call_that_the_sampler_did_not_make_has_no_step(model: Diffuser) -> None:
    x = torch.randn(2, 8, 8, 24, generator=torch.Generator().manual_seed(0))  # nor need it be square
    log_snr, text = torch.zeros(2), model.encode_text(["a cat", "a dog"])
    with record(model) as recording, record(model, steps=[0]) as stepped:
        model.predict_noise(x, log_snr, text)
    assert set(recording) == {(name, "cond", None) for name in model.hookpoints}
    assert recording[ActivationKey(DOWN, "cond", None)].shape == (2, 16, 8, 24)
    assert recording[ActivationKey(MIDDLE, "cond", None)].shape == (2, 32, 4, 12)
    assert len(stepped) == 0


@pytest.mark.parametrize("named", [False, True])
def test_blocks_may_return_tensors_and_take_their_input_by_name(model: Diffuser, named: bool) -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states + 2

    unet = model.unet
    block = Block()
    x = torch.zeros(1, 2, 3, 4)
    original = unet.mid_block.attentions[0]
    context = edit(model, lambda _, update: update * 2, [MIDDLE])  # the name is checked against the real block
    recording = record(model, [MIDDLE])
    unet.mid_block.attentions[0] = block
    try:
        with context, recording:
            out = block(hidden_states=x) if named else block(x)
    finally:
        unet.mid_block.attentions[0] = original
    assert torch.equal(out, x + 4)
    assert torch.equal(recording[ActivationKey(MIDDLE, "cond", None)], torch.full_like(x, 4))


@pytest.mark.parametrize("nothing", [lambda *_: None, lambda _, update: update, lambda _, update: update + 0])
def test_an_edit_of_nothing_is_bit_identical(model: Diffuser, nothing: Any) -> None:
    plain = sample(model)
    with edit(model, nothing):
        same = sample(model)
    assert torch.equal(plain.x, same.x)
    assert plain.x.stride() == same.x.stride()


def test_an_edit_acts_from_its_step_on_and_on_its_branch_alone(model: Diffuser) -> None:
    def run() -> list[SamplerState]:
        return list(model.sample(PROMPTS[:2], seeds=[0, 1], num_inference_steps=4))

    plain = run()
    met: list[ActivationKey] = []
    with edit(model, lambda key, update: met.append(key) or update + 3, [MIDDLE], branches=["cond"], steps=[2, 3]):
        edited = run()
    same = [torch.equal(a.x, b.x) for a, b in zip(plain, edited, strict=True)]
    assert same == [True, True, False, False]
    assert met == [(MIDDLE, "cond", 2), (MIDDLE, "cond", 3)]


def test_an_edit_reaches_its_rows_alone(model: Diffuser) -> None:
    with record(model, [MIDDLE], steps=[0]) as plain:
        sample(model)
    with (
        edit(model, lambda _, update: update + 3, [MIDDLE], branches=["cond"]),
        record(model, [MIDDLE], steps=[0]) as edited,
    ):
        sample(model)
    assert torch.equal(plain[ActivationKey(MIDDLE, "uncond", 0)], edited[ActivationKey(MIDDLE, "uncond", 0)])
    torch.testing.assert_close(plain[ActivationKey(MIDDLE, "cond", 0)] + 3, edited[ActivationKey(MIDDLE, "cond", 0)])


def test_edits_compose_in_order_and_may_write_in_place(model: Diffuser) -> None:
    x, log_snr, text = torch.ones(1, 8, 16, 16), torch.zeros(1), model.encode_text(["a cat"])
    edits = [lambda _, update: update.add_(1), lambda *_: None, lambda _, update: update * 10]
    with (
        record(model, [MIDDLE]) as before,
        edit(model, edits, [MIDDLE]),
        record(model, [MIDDLE]) as after,
    ):
        model.predict_noise(x, log_snr, text)
    key = ActivationKey(MIDDLE, "cond", None)
    torch.testing.assert_close(after[key], (before[key] + 1) * 10)


def test_stopping_spares_calls_and_keeps_the_same_values(model: Diffuser) -> None:
    fired: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
        for name, module in model.unet.named_modules()
    ]
    with record(model, [MIDDLE, DOWN], steps=[0, 1]) as whole:
        sample(model, steps=4)
    n_whole, calls = len(fired), model.n_unet_calls
    fired.clear()
    finished = False
    with record(model, [MIDDLE, DOWN], steps=[0, 1], stop=True) as stopped:
        for _ in model.sample(PROMPTS[:2], seeds=[0, 1], num_inference_steps=4):
            pass
        finished = True
    for handle in handles:
        handle.remove()
    assert not finished  # the rest of the block is skipped
    assert model.n_unet_calls - calls == 2
    assert len(fired) < n_whole / 2
    assert fired[-1].startswith(MIDDLE)  # the later of the two, whatever the order in which they are named
    assert set(whole) == set(stopped)
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_stopping_ends_the_block_that_asked_for_it(model: Diffuser) -> None:
    with record(model, [DOWN]) as outer:
        with record(model, [DOWN], stop=True) as inner:
            sample(model)
        assert not model._lock.is_held
        model.predict_noise(torch.zeros(1, 8, 16, 16), torch.zeros(1), model.encode_text(["a cat"]))
    assert {key.step for key in inner} == {0, 1, 2}
    assert {key.step for key in outer} == {0, 1, 2, None}


def test_contexts_act_on_the_job_that_they_were_handed_to_alone(model: Diffuser) -> None:
    theirs = model.generate_iter(PROMPTS[0], num_inference_steps=2)
    next(theirs)
    updates = record(model, [MIDDLE], steps=[0], stop=True)
    ours = model.sample(PROMPTS[1:], seeds=[0, 1], num_inference_steps=2, contexts=[updates])
    next(theirs)
    assert not updates
    assert n_hooks(model) == 0
    theirs.close()
    assert list(ours) == []  # it stopped within the first call
    assert updates[ActivationKey(MIDDLE, "cond", 0)].shape[0] == 2

    with record(model, [MIDDLE]) as whole:
        plain = model.generate(PROMPTS[0], num_inference_steps=2)
    double = edit(model, lambda _, update: 2 * update, [MIDDLE])
    after = record(model, [MIDDLE])  # entered after the edit: it sees what the edit made
    edited = model.generate(PROMPTS[0], num_inference_steps=2, contexts=[double, after])
    first = ActivationKey(MIDDLE, "cond", 0)
    assert torch.allclose(after[first], 2 * whole[first], atol=1e-5)
    assert not torch.equal(plain.latents, edited.latents)


def test_everything_is_unhooked_after_an_error(model: Diffuser) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), record(model, sink=fail):
        sample(model)
    assert n_hooks(model) == 0
    with pytest.raises(OSError, match="full"), edit(model, fail), record(model):
        sample(model)
    assert n_hooks(model) == 0
    wrong = edit(model, lambda _, update: update[:, :1, 0, 0], [MIDDLE])
    with pytest.raises(ValueError, match=r"returned \[2, 1\] for an update \[2, 32, 8, 8\]"), wrong:
        sample(model)


def test_a_context_can_be_entered_once(model: Diffuser) -> None:
    with record(model) as recording:
        with pytest.raises(RuntimeError, match="entered before"):
            recording.__enter__()
        assert n_hooks(model) == 3
    with pytest.raises(RuntimeError, match="entered before"), recording:
        pass


def test_invalid_hookpoints_branches_and_steps_are_refused(model: Diffuser) -> None:
    with pytest.raises(
        ModelError, match=r"'mid_block.attention' is no .* Its blocks are: down_blocks.0.attentions.0, mid"
    ):
        record(model, ["mid_block.attention"])
    with pytest.raises(ModelError, match="no hookpoint is named"):
        edit(model, [], [])
    with pytest.raises(ValueError, match="one of cond, uncond, not 'text'"):
        record(model, branches=["text"])  # type: ignore[list-item]
    for steps in ([], [-1, 0]):
        with pytest.raises(ValueError, match="numbers from 0 on"):
            record(model, steps=steps)
    with pytest.raises(ValueError, match="no branch uncond"), record(model, branches=["uncond"]):
        sample(model, guidance_scale=1.0)
    with pytest.raises(ValueError, match="Step 3 was asked for; this run has steps 0 to 2"), record(model, steps=[3]):
        sample(model, steps=3)
