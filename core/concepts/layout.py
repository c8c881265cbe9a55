"""Which class stands where, foretold from the active concepts of a block while the picture is still noise.

Two ways from a position's code to class scores:

`dictionary` follows Tinaz et al. 2025 (arXiv 2504.15473, section 4): a concept's embedding is the mean of its labels',
a position's the mean of its active concepts', and a class scores its name's cosine with that. What differs: a
concept's labels are the classes of highest IoU, each weighing as much as its IoU; in place of Word2Vec there is what
`embed` gives for them, and without it each class is a direction of its own; all k active concepts count, for the paper
does not say how many; and a position goes to the best class above `MIN_COSINE`, where the paper makes a mask of each
noun by a threshold that it does not state.

`readout` takes the concepts for independent witnesses (naive Bayes): each active one moves the odds of a class by how
much more often it is active inside that class's masks than anywhere, as counted while it was labelled, and counts by
its share of the position's values. It needs no label, so that concepts which never got one testify too.
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
from core.sae.autoencoder import AllTimes, Code, SparseAutoencoder
from core.sae.collection import find_collection, load_sae

Method = Literal["dictionary", "readout"]
"""How a code becomes class scores."""
Embed = Callable[[Sequence[str]], Tensor]
"""From n labels to their embeddings [n, E]; the same text gives the same embedding."""

METHOD: Method = "readout"
BRANCH: Branch = "cond"
"""Which branch is read where none is named."""

MIN_COSINE = 0.1
"""`dictionary`: the score of no class at all. With one direction a class, a position with any labelled concept has a
class above it."""
SMOOTHING = 64.0
"""`readout`: cells of every class in which a concept is taken to have been active as often as on average, before
counting; about as many as one thing covers, for the cells of one thing are hardly more than one observation."""
PRIOR_WEIGHT = 0.25
"""`readout`: how far the classes' share of all cells counts: at 1 a thing that is seldom met is seldom foretold, at 0
all classes start alike. Measured on 64 held-out pictures: what loses least of the mean IoU over the prompt's things
where 3 concepts are active, and where 11 are."""


class Counts(Protocol):
    """How often latents and classes met, over the cells that a table was made from."""

    @property
    def intersections(self) -> Any:
        """[d_sae, K] cells at which the latent is active and the class is there."""

    @property
    def active(self) -> Any:
        """[d_sae] cells at which the latent is active."""

    @property
    def cells(self) -> Any:
        """[K] cells at which the class is there."""

    @property
    def n_cells(self) -> Any:
        """Cells in all."""


class Concepts(Protocol):
    """What a layout needs of a concept table."""

    @property
    def counts(self) -> Counts:
        """Of its latents and classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes."""

    @property
    def frame(self) -> Any:
        """A pandas frame, a row a latent: latent, label, kind, the label's iou, and `further`, records of the next best
        classes with their label and iou."""


class Reader(NamedTuple):
    """From codes to class scores, position by position."""

    method: Method
    """How."""
    classes: tuple[str, ...]
    """Names of the K classes."""
    testimony: Tensor
    """[d_sae, E] what an active latent contributes: an embedding, or the logarithms of the classes' changes in odds."""
    targets: Tensor
    """`dictionary`: [K, E] embeddings of the classes, of unit norm. `readout`: [K + 1] logarithms of the classes'
    shares of all cells, that of no class last."""

    def scores(self, code: Code) -> Tensor:
        """[N, K + 1] score of each class at N positions, and last that of no class.

        `dictionary`: cosines, and `MIN_COSINE`. `readout`: probabilities that add up to 1.
        """
        weights = (code.values > 0).to(self.testimony)
        if self.method == "readout":
            values = code.values.clamp_min(0).to(self.testimony)
            weights = values * weights.sum(1, keepdim=True) / values.sum(1, keepdim=True).clamp_min(1e-12)
        heard = F.embedding_bag(code.indices.clamp_min(0), self.testimony, mode="sum", per_sample_weights=weights)
        if self.method == "readout":
            return (PRIOR_WEIGHT * self.targets + heard).softmax(1)
        return F.pad(F.normalize(heard, dim=1) @ self.targets.T, (0, 1), value=MIN_COSINE)


@dataclass(frozen=True, eq=False)
class Layout:
    """A foretold label map at the resolution of a hookpoint."""

    labels: Ints
    """[h, w] index into `classes` of the class at each position, -1 where no class is."""
    classes: tuple[str, ...]
    """Names of the K classes that could be foretold."""
    scores: Float32s
    """[K, h, w] `dictionary`: cosines from -1 to 1. `readout`: probabilities from 0 to 1, which over all classes of the
    table and none add up to 1."""
    method: Method
    """How the scores were made."""
    told: bool
    """Whether the classes were named by the caller, as with `among`; else they are all that the table knows."""


def make_reader(concepts: Concepts, method: Method = METHOD, *, embed: Embed | None = None) -> Reader:
    """How to read the concepts of a table.

    Args:
        concepts: The table.
        method: `dictionary` or `readout`.
        embed: `dictionary`: embeddings of labels and class names; by default each class is a direction of its own.

    Raises:
        ValueError: No such method.
    """
    if method not in get_args(Method):
        raise ValueError(f"A layout is read by {' or '.join(get_args(Method))}, not by {method!r}.")
    make = _readout if method == "readout" else _dictionary
    return Reader(method, tuple(concepts.class_names), *make(concepts, embed))


def read_layout(
    update: Tensor, sae: SparseAutoencoder, reader: Reader, *, among: Collection[str] | None = None
) -> Layout:
    """The layout that one picture's residual update [C, h, w] foretells.

    Args:
        update: Of the hookpoint, branch and step that the SAE reads.
        sae: The SAE whose latents the reader knows.
        reader: From codes to scores.
        among: The only classes that may be there, such as those that the prompt names; by default any.

    Raises:
        ValueError: A class that the table does not have.
    """
    code = sae.encode(update.flatten(1).T.to(sae.b_dec.device, torch.float32))
    return read_code(code, (update.shape[1], update.shape[2]), reader, among=among)


def read_code(code: Code, grid: tuple[int, int], reader: Reader, *, among: Collection[str] | None = None) -> Layout:
    """The layout that the codes of h x w positions, row by row, foretell; else as `read_layout`."""
    chosen = list(range(len(reader.classes))) if among is None else _indices(reader.classes, among)
    scores = reader.scores(Code(*(part.to(reader.testimony.device) for part in code)))
    labels = best_classes(scores[:, [*chosen, -1]]).view(grid)
    return Layout(
        labels=labels.cpu().numpy(),
        classes=tuple(reader.classes[i] for i in chosen),
        scores=scores[:, chosen].T.reshape(-1, *grid).cpu().numpy(),
        method=reader.method,
        told=among is not None,
    )


def best_classes(scores: Tensor) -> Tensor:
    """[N] class of the best score in [N, K + 1], the last of which is that of no class: -1."""
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
    among: Collection[str] | None = None,
    embed: Embed | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Layout:
    """Foretell what will be where in the picture of a prompt and seed, from one step of its making.

    Costs step + 1 evaluations of the U-Net, the last of which ends at the hookpoint.

    Args:
        model: The model.
        prompt: The prompt.
        seed: Seed of the picture's noise.
        step: Sampler step to read, from 0.
        method: `dictionary` or `readout`.
        hookpoint: Where to read; by default the model's second.
        branch: Half of the guided batch to read.
        t: Time of the SAE and its concepts; `all` for the ones shared by every step.
        source: Collection of SAEs with their concept tables, as for `core.load_sae`; by default the model's own.
        among: The only classes that may be there, such as those that the prompt names; by default any.
        embed: As for `make_reader`.
        num_inference_steps: Steps of the sampler; by default the model's own.
        guidance_scale: Scale of classifier-free guidance; by default the model's own.

    Raises:
        ArtifactError: There is no such SAE, or no table of its concepts.
        PromptError: A prompt that the model cannot take.
        ValueError: No such method, class or step.
    """
    from core.concepts.table import load_concepts  # which imports pyarrow: nothing else here needs it

    model.check_prompt(prompt)
    collection = find_collection(model.spec.name if source is None else source)
    hookpoint = model.spec.default_hookpoint if hookpoint is None else hookpoint
    sae = load_sae(collection, hookpoint, branch, t)
    reader = make_reader(load_concepts(collection, hookpoint=hookpoint, branch=branch, t=t), method, embed=embed)
    updates = record(model, [hookpoint], branches=[branch], steps=[step], stop=True)
    for _ in model.sample(
        [prompt],
        seeds=[seed],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        last_step=step,
        contexts=[updates],
    ):
        pass
    return read_layout(updates[ActivationKey(hookpoint, branch, step)][0], sae, reader, among=among)


def _readout(concepts: Concepts, _: Embed | None) -> tuple[Tensor, Tensor]:
    """Logarithms of what each latent does to the odds of the classes and of none, [d_sae, K + 1], and of the classes'
    shares of all cells, [K + 1].
    """
    counts = concepts.counts
    inside, active, cells = (
        torch.as_tensor(value).double() for value in (counts.intersections, counts.active, counts.cells)
    )
    n_cells = float(counts.n_cells)
    # Cells of no class: those left over, where masks do not overlap.
    inside = torch.cat([inside, (active - inside.sum(1)).clamp_min(0)[:, None]], dim=1)
    cells = torch.cat([cells, (n_cells - cells.sum()).clamp_min(0)[None]])
    rate = active[:, None] / n_cells
    lift = (inside + SMOOTHING * rate) / (cells + SMOOTHING) / rate
    testimony = torch.where(active[:, None] > 0, lift, 1).log()
    return testimony.float(), (cells / n_cells).log().float()


def _dictionary(concepts: Concepts, embed: Embed | None) -> tuple[Tensor, Tensor]:
    """Each latent's mean embedding of its labels, [d_sae, E], 0 without any; and the classes' unit embeddings."""
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


def _indices(classes: Sequence[str], among: Collection[str]) -> list[int]:
    """Where these classes are, in the table's order."""
    if wrong := [name for name in among if name not in classes]:
        near = difflib.get_close_matches(wrong[0], classes, n=1, cutoff=0)[0]
        raise ValueError(
            f"The table has no class {wrong[0]!r}. Did you mean {near!r}? Its classes: {', '.join(classes)}."
        )
    return [i for i, name in enumerate(classes) if name in among]
