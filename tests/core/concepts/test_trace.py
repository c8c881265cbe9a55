from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.activations.hooks import ActivationKey, record
from core.concepts.trace import CodeTracer, SaeSite, load_saes, trace_image
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.errors import ArtifactError
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.io import save_sae

PROMPT = "a cat on the sea"
STEPS = 3


@pytest.fixture(scope="module")
def saes(model: Diffuser) -> dict[SaeSite, SparseAutoencoder]:
    """An SAE with random weights for each block and branch."""
    with record(model) as updates:
        next(model.sample([PROMPT], seeds=[0], num_inference_steps=STEPS))
    torch.manual_seed(0)
    return {
        SaeSite(key.hookpoint, key.branch): SparseAutoencoder(SaeConfig(update.shape[1], 64, 3)).requires_grad_(False)
        for key, update in updates.items()
    }


def test_a_trace_changes_no_bit_and_holds_the_codes_of_a_plain_recording(
    model: Diffuser, saes: dict[SaeSite, SparseAutoencoder]
) -> None:
    plain = model.generate(PROMPT, seed=2, num_inference_steps=STEPS)
    tracer = CodeTracer(model, saes)
    traced = model.generate(PROMPT, seed=2, num_inference_steps=STEPS, contexts=[tracer.context])
    assert torch.equal(plain.latents, traced.latents)
    np.testing.assert_array_equal(np.asarray(plain.image), np.asarray(traced.image))

    trace = tracer.trace()
    assert (set(trace.sites()), trace.n_steps) == (set(saes), STEPS)
    with record(model) as updates:
        model.generate(PROMPT, seed=2, num_inference_steps=STEPS)
    assert set(trace.codes) == set(updates)
    for key, update in updates.items():
        site = SaeSite(key.hookpoint, key.branch)
        assert key.step is not None
        assert trace.grids[key.hookpoint] == tuple(update.shape[2:])
        by_hand = saes[site].encode(update[0].flatten(1).T.float())
        code = trace.code(site, key.step)
        assert torch.equal(code.indices, by_hand.indices)
        assert torch.equal(code.values, by_hand.values)


def test_a_latents_map_and_evolution_are_those_of_its_codes(
    model: Diffuser, saes: dict[SaeSite, SparseAutoencoder]
) -> None:
    site, tracer = next(iter(saes)), CodeTracer(model, saes)
    model.generate(PROMPT, seed=2, num_inference_steps=STEPS, contexts=[tracer.context])
    trace = tracer.trace()
    number = int(trace.code(site, 1).indices[0, 0])
    shown = trace.map(site, 1, number)
    code = trace.code(site, 1)
    by_hand = torch.where(code.indices == number, code.values, 0).sum(1).view(trace.grids[site.hookpoint])
    torch.testing.assert_close(shown, by_hand)
    evolution = trace.evolution(site, number)
    assert evolution.steps == tuple(range(STEPS))
    assert evolution.peak[1] == pytest.approx(float(by_hand.max()))
    with pytest.raises(KeyError):
        trace.code(site, STEPS)


def test_only_what_an_sae_reads_is_kept(model: Diffuser, saes: dict[SaeSite, SparseAutoencoder]) -> None:
    site = list(saes)[-1]
    tracer = CodeTracer(model, {site: saes[site]})
    assert tracer.trace().n_steps == 0
    model.generate(PROMPT, seed=2, num_inference_steps=STEPS, contexts=[tracer.context])
    assert tracer.trace().sites() == (site,)


def test_a_given_image_is_traced_at_every_step_in_both_branches(
    model: Diffuser, saes: dict[SaeSite, SparseAutoencoder]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    before = model.n_unet_rows
    trace = trace_image(model, image, PROMPT, saes, seed=5, num_inference_steps=STEPS)
    assert model.n_unet_rows == before + 2 * STEPS
    assert trace.n_steps == STEPS
    assert set(trace.codes) == {ActivationKey(*site, step) for site in saes for step in range(STEPS)}

    clean = model.encode(image)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    alphas, _ = model.schedule.sampler_alphas(STEPS)
    abar = torch.tensor(alphas[1])
    noisy = (abar.sqrt() * clean + (1 - abar).sqrt() * noise).float()
    texts: dict[Branch, str] = {"uncond": "", "cond": PROMPT}
    for branch, text in texts.items():
        with record(model) as updates:
            model.predict_noise(noisy, abar.logit()[None], model.encode_text([text]))
        for key, update in updates.items():
            site = SaeSite(key.hookpoint, branch)
            by_hand = saes[site].decode(saes[site].encode(update[0].flatten(1).T))
            torch.testing.assert_close(saes[site].decode(trace.code(site, 1)), by_hand, atol=1e-4, rtol=1e-4)


def test_saes_for_all_times_are_loaded_in_the_models_order(
    model: Diffuser, saes: dict[SaeSite, SparseAutoencoder], tmp_path: Path
) -> None:
    for site in reversed(saes):
        save_sae(saes[site], tmp_path / SaeId(*site, "all").path, {}, torch.float32)
    save_sae(saes[site], tmp_path / SaeId(*site, 0.5).path, {}, torch.float32)
    loaded = load_saes(tmp_path, model)
    assert set(loaded) == set(saes)
    assert tuple(dict.fromkeys(site.hookpoint for site in loaded)) == model.hookpoints


def test_a_collection_without_saes_is_refused(model: Diffuser, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        load_saes(tmp_path, model)
