import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.collection import write_index
from core.sae.io import save_sae
from training.common.report import Table
from training.evaluate import run
from training.evaluate.sae.evaluation import (
    EVALUATION,
    SaeBench,
    SaeSettings,
    reconstruction,
    replacement,
)
from training.evaluate.sae.sums import ReconstructionMoments, ReconstructionSums, tally
from training.hub.cards import write_sae_card
from training.labels.sampling import steps_of

TINY = SaeSettings(n_images=3, n_fit=2, n_steps_each=2, n_replaced=2, batch_size=2, n_bootstrap=20)


def autoencoder(d_in: int, d_sae: int, k: int, seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(d_in, d_sae, k), generator=torch.Generator().manual_seed(seed))
    return sae.requires_grad_(False)


def signs(d: int) -> SparseAutoencoder:
    """Rebuilds everything: a latent for each direction and its opposite."""
    sae = autoencoder(d, 2 * d, d)
    rows = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.encoder.weight.copy_(rows)
    return sae


def test_principal_components_are_those_of_the_whole_data() -> None:
    x = np.random.default_rng(0).normal(size=(500, 5)) * [5, 1, 3, 0.1, 0.2] + 7
    moments = ReconstructionMoments()
    moments.add(x[:200])
    moments.add(x[200:])
    mean, components = moments.components(2)
    np.testing.assert_allclose(mean, x.mean(0))
    _, _, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(components @ rows[:2].T), np.eye(2), atol=1e-6)


def test_explained_variance_in_one_pass_is_that_of_all_positions_together() -> None:
    x = torch.randn(6, 40, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([4.0, 1, 1, 1]) + 10
    sae = autoencoder(4, 16, 2)
    moments = ReconstructionMoments()
    moments.add(x.flatten(0, 1).double().numpy())
    basis = moments.components(2)
    result = ReconstructionSums()
    for image in x:
        tally(result, sae, image, basis, basis)
    flat = x.flatten(0, 1)
    rebuilt = sae.decode(sae.encode(flat))
    variance = (flat - flat.mean(0)).square().sum()
    assert result.explained() == pytest.approx(float(1 - (flat - rebuilt).square().sum() / variance), rel=1e-4)
    eigenvalues = np.linalg.eigvalsh(np.cov(flat.numpy().T))
    assert result.explained(pca=True) == pytest.approx(eigenvalues[-2:].sum() / eigenvalues.sum(), rel=1e-4)
    # The mean of the images' own explained variances would be another number.
    assert result.explained(np.array([0])) != pytest.approx(result.explained(), rel=1e-3)
    assert result.n_active == int((sae.encode(flat).values > 0).sum())
    assert result.fired.sum() == result.n_active


def test_steps_pooled_are_one_larger_step() -> None:
    x = torch.randn(4, 30, 4, generator=torch.Generator().manual_seed(2)) * torch.tensor([4.0, 1, 1, 1])
    steps, sae = (x, 3 * x + 5), autoencoder(4, 16, 2)
    parts = [ReconstructionMoments() for _ in steps]
    for part, positions in zip(parts, steps, strict=True):
        part.add(positions.flatten(0, 1).double().numpy())
    pooled = (parts[0] + parts[1]).components(2)
    each, both = [ReconstructionSums(), ReconstructionSums()], ReconstructionSums()
    for positions, part, result in zip(steps, parts, each, strict=True):
        for image in positions:
            tally(result, sae, image, part.components(2), pooled)
    for images in zip(*steps, strict=True):
        tally(both, sae, torch.cat(images), pooled, pooled)
    together = ReconstructionSums.pooled(each)
    assert together.explained() == pytest.approx(both.explained())
    assert together.explained(pca=True) == pytest.approx(both.explained(pca=True))
    assert together.explained(np.array([1, 1])) == pytest.approx(both.explained(np.array([1, 1])))
    assert (together.fired == both.fired).all()
    assert (together.n_positions, together.n_active) == (both.n_positions, both.n_active)


def test_steps_are_the_nearest_or_spread_evenly() -> None:
    assert steps_of(SaeId("x", "cond", 0.5), 50, 3) == [24]
    assert steps_of(SaeId("x", "cond", "all"), 25, 3) == [0, 12, 24]
    assert steps_of(SaeId("x", "cond", "all"), 2, 5) == [0, 1]


@pytest.mark.slow
def test_two_values_of_k_are_compared(model: Diffuser, tmp_path: Path) -> None:
    hookpoint = model.spec.default_hookpoint
    for name, sae in (("few", autoencoder(32, 64, 2)), ("all", signs(32))):
        for branch in ("cond", "uncond"):
            save_sae(sae, tmp_path / name / SaeId(hookpoint, branch, "all").path)
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {word}" for word in ("cat", "dog", "sun", "sea", "sky") * 20))
    roots, prompts = [tmp_path / "few", tmp_path / "all"], str(tmp_path / "prompts.txt")
    options = run.EvalOptions(["reconstruction"], True, tmp_path / "out", roots, prompts)
    tiny = replace(EVALUATION, quick=TINY)
    first, second, table = run.evaluate(tiny, model, options)
    alone = run.evaluate(tiny, model, options._replace(saes=roots[:1]))
    assert (first.title, second.title) == ("Reconstruction of held-out images: few", f"{alone[0].title}: all")
    assert (first.name, second.name) == ("reconstruction-few", "reconstruction-all")
    assert len(alone) == 1
    assert [(row["branch"], row["hookpoint"]) for row in table.rows] == [("cond", hookpoint), ("uncond", hookpoint)]
    assert len(table.rows[0]) == 2 + 3  # two steps, and both together
    few, every = str(table.rows[0]["SAE for t = all, step together"]).split("<br>")
    assert few.endswith("k 2")
    assert every.startswith("1.000 (1.000 to 1.000); PCA 1")
    assert every.endswith("k 32")


def check_card(root: Path, saes: dict[SaeId, SparseAutoencoder], tables: list[Table]) -> None:
    for sae_id, sae in saes.items():
        save_sae(sae, root / sae_id.path, {"n_samples": 7, "seed": 0}, torch.float16)
    recipe = {"model": "picturebook", "prompts": "grammar", "stream": {"batch_size": 4}}
    training = {"n_steps": 5, "gradient_accumulation_steps": 2, "architecture": "topk", "expansion": 2}
    write_index(root, tuple(saes), recipe={**recipe, "training": training})
    write_sae_card(root, "picturebook", tables)
    lines = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [sae_id.path for sae_id in saes]
    weights = (root / lines[0]["path"] / "sae_weights.safetensors").read_bytes()
    assert lines[0]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert lines[0]["metrics"]["explained_variance"] == pytest.approx(1, abs=1e-4)
    card = (root / "README.md").read_text()
    assert "40\nsamples" in card
    assert [line["files"].keys() for line in lines] == [{"cfg.json", "sae_weights.safetensors"}] * len(lines)
    assert f"| `{lines[0]['path']}` | 32 of " in card
    assert "| no table |" in card
    compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec")


@pytest.mark.slow
def test_perfect_autoencoders_explain_everything_and_cost_nothing(model: Diffuser, tmp_path: Path) -> None:
    hookpoint = model.spec.default_hookpoint
    channels = 32
    saes = {
        SaeId(hookpoint, "cond", "all"): signs(channels),
        SaeId(hookpoint, "uncond", "all"): signs(channels),
        SaeId(hookpoint, "cond", 0.5): autoencoder(channels, 64, 2),
    }
    prompts = ["a cat on the grass", "a ship in the sea", "a dog", "a whale", "a house"]
    table = reconstruction(SaeBench(model, saes, prompts, TINY))
    assert len(table.rows) == 3 + 3 + 1  # two steps each, and both together
    assert table.details["figures"][f"{hookpoint}/cond/tall"]["explained_variance"] == pytest.approx(1, abs=1e-4)
    for row in table.rows[:6]:
        assert str(row["explained variance"]).startswith("1.000")
        assert row["L0"] == pytest.approx(channels, abs=0.1)
    assert not str(table.rows[6]["explained variance"]).startswith("1.000")
    check_card(tmp_path, saes, [table])
    costs = {row["hookpoint"]: row for row in replacement(SaeBench(model, saes, prompts, TINY)).rows}
    assert str(costs[hookpoint]["replaced by its reconstruction"]).startswith("0.000")
    assert not str(costs[hookpoint]["removed"]).startswith("0.000")
