"""Layout prediction: the class at each position, from the active concepts of a block while the image is still noise.

There are two ways from a position's code to class scores.

`dictionary` follows Tinaz et al. 2025 (arXiv 2504.15473, section 4): the embedding of a concept is the mean over its
labels, that of a position the mean over its active concepts, and the score of a class is the cosine with its name's
embedding. Differences: the labels of a concept are its classes of highest IoU, weighted by IoU; `embed` takes the place
of Word2Vec, and without it the classes are orthogonal; all k active concepts count, since the paper gives no number;
and a position gets the best class above `MIN_COSINE`, where the paper thresholds a mask for each noun at a value that
it does not state.

`readout` is naive Bayes: each active concept adds the log-likelihood ratio of each class, that is, how much more often
it is active inside the masks of the class than elsewhere, as counted while concepts were labelled, weighted by its
share of the position's activation. It needs no labels, so unlabelled concepts contribute as well.
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from core.activations.hooks import ActivationKey, record
from core.arrays import Float32s, Ints
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.errors import NotFiniteError
from core.sae.autoencoder import AllTimes, Code, SaeId, SparseAutoencoder, output_hookpoints
from core.sae.collection import find_collection, load_sae

Method = Literal["dictionary", "readout"]
"""How class scores are computed from a code."""
Embed = Callable[[Sequence[str]], Tensor]
"""Maps n labels to their embeddings [n, E], deterministically."""

METHOD: Method = "readout"
BRANCH: Branch = "cond"
"""The branch to read where none is named."""

MIN_COSINE = 0.1
"""`dictionary`: the score of "no class". With orthogonal classes, any position with a labelled concept exceeds it."""
SMOOTHING = 64.0
"""`readout`: pseudo-count, in cells of each class, at the concept's average firing rate. About the area of one object,
because the cells of one object are hardly more than one independent observation."""
PRIOR_WEIGHT = 0.25
"""`readout`: weight of the log prior, the classes' share of all cells. At 1 rare classes are rarely predicted, at 0 the
prior is uniform. Chosen on 64 held-out images for the mean IoU of the prompt's objects, both with 3 and with 11 active
concepts."""


class Counts(Protocol):
    """Co-occurrence of latents and classes, over the cells that a table was made from."""

    @property
    def intersections(self) -> Any:
        """[d_sae, K] cells where the latent is active and the class is present."""

    @property
    def active(self) -> Any:
        """[d_sae] cells where the latent is active."""

    @property
    def cells(self) -> Any:
        """[K] cells of each class."""

    @property
    def n_cells(self) -> Any:
        """Number of cells."""


class Concepts(Protocol):
    """What layout prediction needs of a concept table."""

    @property
    def counts(self) -> Counts:
        """Co-occurrence of its latents and classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes."""

    @property
    def frame(self) -> Any:
        """A pandas frame, one row per latent: latent, label, kind, the label's iou, and `runner_ups`, records of the
        next best classes with label and iou."""


class Reader(NamedTuple):
    """Computes class scores from codes, position by position."""

    method: Method
    """How it does."""
    classes: tuple[str, ...]
    """Names of the K classes."""
    contributions: Tensor
    """`dictionary`: [d_sae, E] mean embedding of each latent's labels. `readout`: [d_sae, K + 1] log-likelihood ratios
    of the classes given that the latent is active, "no class" last."""
    targets: Tensor
    """`dictionary`: [K, E] unit embeddings of the classes. `readout`: [K + 1] log priors, "no class" last."""

    def scores(self, code: Code) -> Tensor:
        """[N, K + 1] scores of the classes at N positions, "no class" last.

        `dictionary`: cosines, and `MIN_COSINE`. `readout`: probabilities that sum to 1.
        """
        weights = (code.values > 0).to(self.contributions)
        if self.method == "readout":
            values = code.values.clamp_min(0).to(self.contributions)
            weights = values * weights.sum(1, keepdim=True) / values.sum(1, keepdim=True).clamp_min(1e-12)
        total = F.embedding_bag(code.indices.clamp_min(0), self.contributions, mode="sum", per_sample_weights=weights)
        if self.method == "readout":
            return (PRIOR_WEIGHT * self.targets + total).softmax(1)
        return F.pad(F.normalize(total, dim=1) @ self.targets.T, (0, 1), value=MIN_COSINE)


@dataclass(frozen=True, eq=False)
class Layout:
    """A predicted label map at the resolution of a hookpoint."""

    labels: Ints
    """[h, w] index into `classes` of the class at each position, -1 for none."""
    classes: tuple[str, ...]
    """Names of the K classes that could be predicted."""
    scores: Float32s
    """[K, h, w] `dictionary`: cosines from -1 to 1. `readout`: probabilities, which sum to 1 over all classes of the
    table and "no class"."""
    method: Method
    """How the scores were computed."""
    restricted: bool
    """Whether only the caller's `candidate_classes` could be predicted; otherwise all classes of the table."""


def make_reader(concepts: Concepts, method: Method = METHOD, *, embed: Embed | None = None) -> Reader:
    """The reader of a concept table.

    Args:
        concepts: The table.
        method: `dictionary` or `readout`.
        embed: For `dictionary`: embeddings of class names; by default the classes are orthogonal.

    Raises:
        ValueError: No such method.
    """
    if method not in get_args(Method):
        raise ValueError(f"A layout is read by {' or '.join(get_args(Method))}, not by {method!r}.")
    make = _readout if method == "readout" else _dictionary
    return Reader(method, tuple(concepts.class_names), *make(concepts, embed))


def read_layout(
    update: Tensor, sae: SparseAutoencoder, reader: Reader, *, candidate_classes: Collection[str] | None = None
) -> Layout:
    """The layout predicted from one image's residual update [C, h, w].

    Args:
        update: The update, of the hookpoint, branch and step that the SAE reads.
        sae: The SAE.
        reader: The reader of the SAE's concept table.
        candidate_classes: The only classes to predict, such as those that the prompt names; all by default.

    Raises:
        ValueError: A class that the table does not have.
    """
    if not update.isfinite().all():
        raise NotFiniteError("The block of the U-Net", update.dtype)
    code = sae.encode(update.flatten(1).T.to(sae.b_dec.device, torch.float32))
    return read_code(code, (update.shape[1], update.shape[2]), reader, candidate_classes=candidate_classes)


def read_code(
    code: Code, grid: tuple[int, int], reader: Reader, *, candidate_classes: Collection[str] | None = None
) -> Layout:
    """The layout predicted from the code of a grid (h, w) of positions, row by row; otherwise as `read_layout`."""
    everything = list(range(len(reader.classes)))
    chosen = everything if candidate_classes is None else _indices(reader.classes, candidate_classes)
    scores = reader.scores(Code(*(part.to(reader.contributions.device) for part in code)))
    labels = best_classes(scores[:, [*chosen, -1]]).view(grid)
    return Layout(
        labels=labels.cpu().numpy(),
        classes=tuple(reader.classes[i] for i in chosen),
        scores=scores[:, chosen].T.reshape(-1, *grid).cpu().numpy(),
        method=reader.method,
        restricted=candidate_classes is not None,
    )


def best_classes(scores: Tensor) -> Tensor:
    """[N] index of the best class from scores [N, K + 1]; -1 where the last, "no class", is best."""
    best = scores.argmax(1)
    return torch.where(best == scores.shape[1] - 1, -1, best)


def predict_layout(
    model: Diffuser,
    prompt: str,
    *,
    seed: int = 0,
    step: int = 0,
    method: Method = METHOD,
    hookpoint: str | None = None,
    branch: Branch = BRANCH,
    t: float | AllTimes = "all",
    source: str | Path | None = None,
    candidate_classes: Collection[str] | None = None,
    embed: Embed | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Layout:
    """Predict the layout of the image of a prompt and seed from one step of the denoising.

    Takes step + 1 evaluations of the U-Net; the last one stops at the hookpoint.

    Args:
        model: The model.
        prompt: The prompt.
        seed: Seed of the initial noise.
        step: Sampler step to read, from 0.
        method: `dictionary` or `readout`.
        hookpoint: Cross-attention block to read; by default the bottleneck's.
        branch: Branch of classifier-free guidance to read.
        t: Normalised time of the SAE and its concepts, or `all` for the SAE shared by every step.
        source: Collection of SAEs with concept tables, as for `core.load_sae`; by default the model's own.
        candidate_classes: The only classes to predict, such as those that the prompt names; all by default.
        embed: As for `make_reader`.
        num_inference_steps: Steps of the sampler; by default the model's own.
        guidance_scale: Scale of classifier-free guidance; by default the model's own.

    Raises:
        ArtifactError: There is no such SAE, or no concept table of it.
        PromptError: A prompt that the model cannot take.
        ValueError: No such method, class or step.
    """
    from core.concepts.table import load_concepts  # imports pyarrow, which nothing else here needs

    model.check_prompt(prompt)
    collection = find_collection(model.spec.name if source is None else source)
    hookpoint = model.spec.default_hookpoint if hookpoint is None else hookpoint
    sae = load_sae(collection, hookpoint, branch, t)
    reads = output_hookpoints({SaeId(hookpoint, branch, t): sae})
    reader = make_reader(load_concepts(collection, hookpoint=hookpoint, branch=branch, t=t), method, embed=embed)
    updates = record(model, [hookpoint], branches=[branch], steps=[step], stop=True, outputs=reads)
    for _ in model.sample(
        [prompt],
        seeds=[seed],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        last_step=step,
        contexts=[updates],
    ):
        pass
    return read_layout(
        updates[ActivationKey(hookpoint, branch, step)][0], sae, reader, candidate_classes=candidate_classes
    )


def _readout(concepts: Concepts, _: Embed | None) -> tuple[Tensor, Tensor]:
    """Log-likelihood ratios [d_sae, K + 1] of the classes and "no class" for each latent, and log priors [K + 1]."""
    counts = concepts.counts
    inside, active, cells = (
        torch.as_tensor(value).double() for value in (counts.intersections, counts.active, counts.cells)
    )
    n_cells = float(counts.n_cells)
    # Cells without a class are the rest, as masks do not overlap.
    inside = torch.cat([inside, (active - inside.sum(1)).clamp_min(0)[:, None]], dim=1)
    cells = torch.cat([cells, (n_cells - cells.sum()).clamp_min(0)[None]])
    rate = active[:, None] / n_cells
    lift = (inside + SMOOTHING * rate) / (cells + SMOOTHING) / rate
    log_ratios = torch.where(active[:, None] > 0, lift, 1).log()
    return log_ratios.float(), (cells / n_cells).log().float()


def _dictionary(concepts: Concepts, embed: Embed | None) -> tuple[Tensor, Tensor]:
    """Mean embedding of each latent's labels [d_sae, E], 0 without any, and unit embeddings of the classes [K, E]."""
    frame, names = concepts.frame, list(concepts.class_names)
    frame = frame[frame["label"].isin(names) & (frame["kind"] != "unlabelled")]
    labels = list(zip(frame["latent"], frame["label"], frame["iou"], strict=True))
    for latent, others in zip(frame["latent"], frame["runner_ups"], strict=True):
        labels += [(latent, other["label"], other["iou"]) for other in others if other["label"] in names]
    latents = torch.tensor([latent for latent, _, _ in labels], dtype=torch.int64)
    targets = torch.eye(len(names)) if embed is None else embed(names).float()
    of_labels = targets[[names.index(label) for _, label, _ in labels]]
    of_labels = of_labels * torch.tensor([iou for _, _, iou in labels], dtype=torch.float32)[:, None]
    d_sae = len(torch.as_tensor(concepts.counts.active))
    total = torch.zeros(d_sae, targets.shape[1]).index_add_(0, latents, of_labels)
    n = torch.bincount(latents, minlength=d_sae).clamp_min(1)
    return total / n[:, None], F.normalize(targets, dim=1)


def _indices(classes: Sequence[str], candidates: Collection[str]) -> list[int]:
    """Indices of the candidates, in the table's order."""
    if wrong := [name for name in candidates if name not in classes]:
        near = difflib.get_close_matches(wrong[0], classes, n=1, cutoff=0)[0]
        raise ValueError(
            f"The table has no class {wrong[0]!r}. Did you mean {near!r}? Its classes: {', '.join(classes)}."
        )
    return [i for i, name in enumerate(classes) if name in candidates]
