from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import core
from core.concepts import layout
from core.concepts.layout import Reader, best_classes, make_reader, predict_layout, read_code, read_layout
from core.diffusion.diffuser import Diffuser
from core.errors import ArtifactError, PromptError
from core.sae.autoencoder import Code, SaeConfig, SaeId, SparseAutoencoder
from core.sae.io import save_sae

CLASSES = ("cat", "dog", "sea")
N_LATENTS = 8
MIDDLE = "mid_block.attentions.0"
TRUTH = torch.tensor([[2, 2, 2, 2, 2, 2], [2, 0, 0, 2, 1, 2], [2, 0, 0, 2, 1, 1], [-1, -1, -1, -1, -1, -1]])


def concepts(intersections: Any, active: Any, cells: Any, n_cells: Any, labels: dict[int, tuple[str, float]]) -> Any:
    """A table of what its users need."""
    rows = [
        (latent, *labels.get(latent, ("", 0.0)), "object" if latent in labels else "unlabelled", ())
        for latent in range(len(active))
    ]
    frame = pd.DataFrame(rows, columns=["latent", "label", "iou", "kind", "runner_ups"])
    counts = SimpleNamespace(intersections=intersections, active=active, cells=cells, n_cells=n_cells)
    return SimpleNamespace(counts=counts, class_names=CLASSES, frame=frame)


def planted() -> Any:
    """Latents 0 and 1 are the cat's, 2 the dog's, 3 and 4 the sea's, 5 is everywhere, 6 where nothing is, 7 silent."""
    cells = torch.tensor([2000.0, 1000, 6000])
    inside = torch.zeros(N_LATENTS, 3)
    inside[0, 0], inside[1, 0], inside[2, 1], inside[3, 2], inside[4, 2] = 1500, 900, 800, 5000, 2000
    inside[5] = cells * 0.5
    active = inside.sum(1)
    active[0] += 50  # a cat's latent strays
    active[5] += 500
    active[6] = 700
    labels = {0: ("cat", 0.7), 1: ("cat", 0.4), 2: ("dog", 0.8), 3: ("sea", 0.8), 4: ("sea", 0.3), 5: ("sea", 0.2)}
    return concepts(inside, active, cells, torch.tensor(10_000.0), labels)


def planted_code(generator: torch.Generator) -> Code:
    """What is active in `TRUTH`: one of the class's latents, and the one that is everywhere."""
    of_class = {0: (0, 1), 1: (2, 2), 2: (3, 4), -1: (6, 6)}
    drawn = torch.randint(2, (TRUTH.numel(),), generator=generator).tolist()
    own = [of_class[int(c)][i] for c, i in zip(TRUTH.flatten(), drawn, strict=True)]
    indices = torch.stack([torch.tensor(own), torch.full((TRUTH.numel(),), 5), torch.full((TRUTH.numel(),), -1)], dim=1)
    values = torch.rand(indices.shape, generator=generator) + 0.5
    return Code(indices, values.masked_fill(indices < 0, 0))


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("method", ["dictionary", "readout"])
def test_a_planted_layout_is_recovered(method: Any, embedded: bool) -> None:
    def embed(names: Any) -> Tensor:
        """Words that have something in common."""
        vectors = {"cat": [1.0, 0.2, 0], "dog": [0.2, 1, 0], "sea": [0, 0, 2]}
        return torch.tensor([vectors[name] for name in names])

    table = planted()
    if method == "dictionary":  # whose everywhere-latent would make anything sea: it is named, but weakly
        table.frame.loc[5, "kind"] = "unlabelled"
    reader = make_reader(table, method, embed=embed if embedded else None)
    if method == "dictionary":
        assert reader.contributions.shape == (N_LATENTS, 3)
        assert bool(reader.contributions[0, 1] > 0) == embedded
    labels = best_classes(reader.scores(planted_code(torch.Generator().manual_seed(0)))).view(TRUTH.shape)
    assert torch.equal(labels, TRUTH)


def test_a_readout_is_naive_bayes_by_hand() -> None:
    table = concepts(
        np.array([[30.0, 10], [0, 40]]), np.array([50.0, 40]), np.array([60.0, 100]), 200, {}
    )  # and 40 cells of no class, 10 of them with latent 0
    table.class_names = ("cat", "sea")
    reader = make_reader(table)
    code = Code(torch.tensor([[0, 1], [0, -1]]), torch.tensor([[3.0, 1], [2, 0]]))

    def lift(inside: float, cells: float, rate: float) -> float:
        return float((inside + layout.SMOOTHING * rate) / (cells + layout.SMOOTHING) / rate)

    def odds(weights: tuple[float, float]) -> Any:
        classes = ((60, 30, 0), (100, 10, 40), (40, 10, 0))
        logs = [
            layout.PRIOR_WEIGHT * np.log(cells / 200)
            + weights[0] * np.log(lift(first, cells, 50 / 200))
            + weights[1] * np.log(lift(second, cells, 40 / 200))
            for cells, first, second in classes
        ]
        return np.exp(logs) / np.exp(logs).sum()

    scores = reader.scores(code).numpy()
    np.testing.assert_allclose(scores[0], odds((1.5, 0.5)), rtol=1e-5)  # two witnesses, by their share of the values
    np.testing.assert_allclose(scores[1], odds((1, 0)), rtol=1e-5)


def test_a_latent_that_always_or_never_fires_changes_no_odds() -> None:
    reader = make_reader(planted())
    # Half of every class's cells and of those of none: no odds move but by rounding.
    assert float(reader.contributions[5].abs().max()) < 1e-5
    assert float(reader.contributions[7].abs().max()) == 0
    silent = reader.scores(Code(torch.tensor([[-1, -1]]), torch.zeros(1, 2)))
    shares = torch.tensor([0.2, 0.1, 0.6, 0.1]) ** layout.PRIOR_WEIGHT
    torch.testing.assert_close(silent[0], shares / shares.sum())


def test_a_dictionary_averages_labels_and_takes_cosines_by_hand() -> None:
    table = planted()
    table.frame.at[2, "runner_ups"] = np.array([{"label": "cat", "iou": 0.6}, {"label": "storm", "iou": 0.5}])
    table.frame.loc[6, ["label", "iou", "kind"]] = ("storm", 0.9, "style")  # neither of them a class
    reader = make_reader(table, "dictionary")
    torch.testing.assert_close(reader.contributions[2], torch.tensor([0.3, 0.4, 0.0]))
    torch.testing.assert_close(reader.contributions[3], torch.tensor([0.0, 0.0, 0.8]))
    assert float(reader.contributions[6].abs().sum()) == 0
    scores = reader.scores(Code(torch.tensor([[2, 3], [6, -1], [2, 6]]), torch.tensor([[9.0, 1], [1, 0], [1, 0.5]])))
    mean = np.array([0.3, 0.4, 0.8])
    np.testing.assert_allclose(scores[0, :3], mean / np.linalg.norm(mean), rtol=1e-5)
    assert scores[1].tolist() == pytest.approx([0, 0, 0, layout.MIN_COSINE])
    assert best_classes(scores).tolist() == [2, -1, 1]


def identity(d: int) -> SparseAutoencoder:
    """A latent for each channel."""
    sae = SparseAutoencoder(SaeConfig(d, d, 2)).requires_grad_(False)
    sae.encoder.weight.copy_(torch.eye(d))
    sae.W_dec.copy_(torch.eye(d))
    return sae


def test_a_layout_keeps_its_shape_and_its_candidate_classes() -> None:
    code = planted_code(torch.Generator().manual_seed(1))
    update = torch.zeros(N_LATENTS, TRUTH.numel())
    update[code.indices[:, 0], torch.arange(TRUTH.numel())] = 2.0
    update = update.view(N_LATENTS, *TRUTH.shape)
    reader, sae = make_reader(planted()), identity(N_LATENTS)
    free = read_layout(update, sae, reader)
    np.testing.assert_array_equal(free.labels, TRUTH)
    assert (free.classes, free.restricted, free.method) == (CLASSES, False, "readout")
    assert free.scores.shape == (3, 4, 6)
    of_code = read_code(code, (TRUTH.shape[0], TRUTH.shape[1]), reader)
    np.testing.assert_array_equal(of_code.labels, TRUTH)
    few = read_layout(update, sae, reader, candidate_classes=["sea", "dog"])
    assert (few.classes, few.restricted) == (("dog", "sea"), True)
    np.testing.assert_array_equal(few.labels[TRUTH == 1], 0)
    np.testing.assert_array_equal(few.labels[TRUTH == 2], 1)
    np.testing.assert_array_equal(few.scores, free.scores[1:])
    with pytest.raises(ValueError, match=r"no class 'cats'. Did you mean 'cat'\?"):
        read_layout(update, sae, reader, candidate_classes=["cats"])
    with pytest.raises(ValueError, match="by dictionary or readout, not by 'magic'"):
        make_reader(planted(), "magic")  # type: ignore[arg-type]


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """An SAE of the small model's middle block."""
    save_sae(identity(32), tmp_path / SaeId(MIDDLE, "cond", "all").path, {}, torch.float32)
    return tmp_path


def load(*_: Any, **__: Any) -> Any:
    table = planted()
    counts = table.counts
    pad = torch.zeros(32 - N_LATENTS, 3)
    counts.intersections = torch.cat([counts.intersections, pad])
    counts.active = torch.cat([counts.active, pad[:, 0]])
    return table


def test_a_prediction_at_the_first_step_costs_one_evaluation(model: Diffuser, collection: Path) -> None:
    with patch("core.concepts.table.load_concepts", load):
        before, rows = model.n_unet_calls, model.n_unet_rows
        first = core.predict_layout(model, "a cat on the sea", source=collection, candidate_classes=["cat", "sea"])
        assert (model.n_unet_calls, model.n_unet_rows) == (before + 1, rows + 2)  # one, guided
        up_block = model.unet.up_blocks[1]
        with patch.object(up_block, "forward", side_effect=AssertionError("computed in vain")):
            predict_layout(model, "a cat on the sea", source=collection)
        before += 1
        later = predict_layout(model, "a cat on the sea", step=2, source=collection, method="dictionary")
        assert model.n_unet_calls == before + 1 + 3
        assert first.labels.shape == later.labels.shape == (8, 8)
        assert (first.restricted, later.restricted, later.method) == (True, False, "dictionary")
        with core.activations.hooks.record(model, [MIDDLE], branches=["cond"]) as updates:
            next(model.sample(["a cat on the sea"], seeds=[3], num_inference_steps=4))
        (update,) = updates.values()
        by_hand = read_layout(update[0], identity(32), make_reader(load()))
        same = predict_layout(model, "a cat on the sea", seed=3, num_inference_steps=4, source=collection)
        np.testing.assert_allclose(same.scores, by_hand.scores, atol=1e-5)
        assert not np.allclose(first.scores[0], same.scores[0])  # another seed
    assert not model._lock.is_held


def test_what_cannot_be_predicted_is_refused_before_any_work(model: Diffuser, collection: Path) -> None:
    before = model.n_unet_calls
    with patch("core.concepts.table.load_concepts", load):
        for wrong, error in (
            ({"prompt": ""}, PromptError),
            ({"prompt": "a cat", "step": 99, "num_inference_steps": 4}, ValueError),
            ({"prompt": "a cat", "branch": "uncond"}, ArtifactError),
            ({"prompt": "a cat", "method": "magic"}, ValueError),
        ):
            with pytest.raises(error):
                predict_layout(model, **{"source": collection, **wrong})  # type: ignore[arg-type]
    assert model.n_unet_calls == before
    assert isinstance(make_reader(planted()), Reader)
