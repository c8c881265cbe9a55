"""The files of a concept table, which `python -m training labels` writes and `core.concepts.table` reads.

In the folder of an SAE: `concepts.parquet`, one row per latent; `counts.safetensors`, co-occurrence of latents and
classes; and `examples.safetensors`, the images that show each latent best. `core/sae/FORMAT.md` describes them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.artifacts import file_sha256
from core.errors import ArtifactError
from core.files import write_atomically
from core.sae.io import SPARSIFY_WEIGHTS, WEIGHTS

TABLE = "concepts.parquet"
COUNTS = "counts.safetensors"
EXAMPLES = "examples.safetensors"
EFFECTS = "word_effects"
"""Optional column of a table: the effect of each style word on the latent."""
REMEDY = "Make it with `python -m training labels`."

Kind = Literal["object", "background", "style", "context-free", "unlabelled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of concepts: an object or a background where it fires, a style of the whole image, a position, or none."""

_INFO = b"concepts"
"""Key of the `TableInfo` in the metadata of the Parquet schema."""


class Candidate(NamedTuple):
    """A class, and how well the activation of a latent, above its best threshold for the class, matches its masks."""

    label: str
    """Name of the class."""
    iou: float
    """Intersection over union on the images on which the threshold was chosen."""
    held_out_iou: float
    """Intersection over union on the other images."""


class Scores(NamedTuple):
    """Measurements of a latent; all 0 or empty if it never fires."""

    best_class: str
    """The class of the highest IoU, whether or not it became the label."""
    iou: float
    """IoU with the best class, on the images on which it was chosen."""
    held_out_iou: float
    """IoU with the best class, on the other images."""
    precision: float
    """Share of the cells above the threshold that are of the best class; held out."""
    recall: float
    """Share of the best class's cells that are above the threshold; held out."""
    chance_iou: float
    """Mean held-out IoU when images are paired with the masks of others, class and threshold being chosen again."""
    p_value: float
    """p-value of the held-out IoU under such permutations of the masks."""
    threshold: float
    """The threshold for the best class, from which on a value counts as active; 0: any value above 0."""
    firing_rate: float
    """Share of all cells where it is active."""
    mean: float
    """Mean of its values where it is active."""
    p99: float
    """99th percentile of its values where it is active."""
    spread: float
    """Root mean square distance of its activation from the centre of activation in an image, in units of the image's
    side; uniform activation has 0.41."""
    typical_t: float
    """Mean normalised time weighted by activation; 1.0 is the first step, 0.0 the last."""
    position_share: float
    """Share of its variance within a step that position alone explains."""
    style: str
    """The style word that its mean over an image predicts best."""
    style_auroc: float
    """Held-out AUROC of that mean for the style word."""
    runner_ups: tuple[Candidate, ...]
    """The next best classes, best first."""


class LabelledLatent(NamedTuple):
    """The label of a latent."""

    label: str
    """Empty if it has none."""
    kind: Kind
    """Kind of the concept."""
    scores: Scores
    """The measurements."""


class Counts(NamedTuple):
    """Co-occurrence of latents and classes, over the cells on which labels were chosen; float32."""

    intersections: Tensor
    """[d_sae, K] cells where the latent is active and the class is present."""
    active: Tensor
    """[d_sae] cells where the latent is active."""
    cells: Tensor
    """[K] cells of each class."""
    n_cells: Tensor
    """[] number of cells."""


class Examples(NamedTuple):
    """Images of the shared gallery that show each latent best, strongest first."""

    images: Tensor
    """[d_sae, 8] int16 numbers in the gallery; -1 where there are no more."""
    maps: Tensor
    """[d_sae, 8, h, w] uint8 maximum over the steps, scaled so that the peak in the image is 255."""
    peaks: Tensor
    """[d_sae, 8] float32 largest value in the image."""


@dataclass(frozen=True)
class TableInfo:
    """What a table was made from, and how; kept in the metadata of its file."""

    weights_sha256: str
    """Hash of the SAE's weights."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Synonyms by label."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the labelling, as JSON values."""
    effect_words: tuple[str, ...] = ()
    """Style words whose effects are in the column `word_effects`, in its order."""


def save_table(folder: Path, rows: Sequence[LabelledLatent], info: TableInfo, effects: Tensor | None = None) -> None:
    """Write the table of an SAE atomically.

    Args:
        folder: The SAE's folder.
        rows: One row per latent.
        info: What the table was made from.
        effects: [effect words, d_sae] change of each latent's mean value that a style word causes at one step
            (`training.labels.effects`).
    """
    records = [
        {"latent": number, "label": row.label, "kind": row.kind, **_plain(row.scores)}
        for number, row in enumerate(rows)
    ]
    schema = _schema()
    if effects is not None:
        schema = schema.append(pa.field(EFFECTS, pa.list_(pa.float32())))
        for record, own in zip(records, effects.T.tolist(), strict=True):
            record[EFFECTS] = own
    schema = schema.with_metadata({_INFO: json.dumps(asdict(info))})
    with write_atomically(folder / TABLE) as part:
        pq.write_table(pa.Table.from_pylist(records, schema=schema), part, compression="zstd")


def read_table(path: Path) -> tuple[Any, TableInfo]:
    """The pandas frame of a table, one row per latent, and what it was made from.

    Raises:
        ArtifactError: The file is missing, damaged, or not a concept table.
    """
    if not path.is_file():
        raise ArtifactError(f"There is no concept table {path}. {REMEDY}")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"The concept table {path} is damaged ({error}). {REMEDY}") from error
    metadata = table.schema.metadata or {}
    lacking = [name for name in _schema().names if name not in table.schema.names]
    if _INFO not in metadata or lacking:
        what = f"column {lacking[0]!r}" if lacking else "metadata"
        raise ArtifactError(f"{path} is not a concept table, or has another version: it has no {what}. {REMEDY}")
    try:
        return _checked(table).to_pandas(), _info(json.loads(metadata[_INFO]))
    except (AttributeError, ValueError, TypeError, KeyError, RecursionError, pa.ArrowException) as error:
        raise ArtifactError(f"The concept table {path} is damaged or of another program: {error}. {REMEDY}") from error


def save_tensors(path: Path, tensors: Counts | Examples) -> None:
    """Write counts or examples atomically."""
    with write_atomically(path) as part:
        save_file({name: value.contiguous() for name, value in tensors._asdict().items()}, part)


def read_counts(path: Path) -> Counts:
    """The counts in a file `counts.safetensors`."""
    return Counts(**_read_tensors(path, Counts._fields))


def read_examples(path: Path) -> Examples:
    """The examples in a file `examples.safetensors`."""
    return Examples(**_read_tensors(path, Examples._fields))


def weights_sha256(folder: Path) -> str:
    """sha256 of the weights of the SAE in a folder."""
    for name in (WEIGHTS, SPARSIFY_WEIGHTS):
        if (folder / name).is_file():
            return file_sha256(folder / name)
    raise ArtifactError(f"{folder} has no {WEIGHTS}.")


def _schema() -> Any:
    """Columns of the table: those of `Scores` after latent, label and kind."""
    types = {
        str: pa.string(),
        float: pa.float32(),
        tuple[Candidate, ...]: pa.list_(pa.struct(_arrow_fields(Candidate, {str: pa.string(), float: pa.float32()}))),
    }
    first = [pa.field("latent", pa.int32()), pa.field("label", pa.string()), pa.field("kind", pa.string())]
    return pa.schema(first + _arrow_fields(Scores, types))


def _arrow_fields(kind: type, types: Mapping[Any, Any]) -> list[Any]:
    return [pa.field(name, types[hint]) for name, hint in get_type_hints(kind).items()]


def _plain(scores: Scores) -> dict[str, Any]:
    return {**scores._asdict(), "runner_ups": [candidate._asdict() for candidate in scores.runner_ups]}


def _checked(table: Any) -> Any:
    """The table with the types that its columns have to have, and no empty labels or unknown kinds."""
    for field_ in _schema():
        at = table.schema.get_field_index(field_.name)
        if not table.schema.field(at).type.equals(field_.type):
            table = table.set_column(at, field_, table.column(at).cast(field_.type))
    for name in ("label", "kind", "best_class", "style"):
        if table.column(name).null_count:
            raise ValueError(f"the column {name} has rows without a value")
    if unknown := set(table.column("kind").to_pylist()) - set(KINDS):
        raise ValueError(f"there is no kind {min(unknown)!r}")
    return table


def _info(stored: Any) -> TableInfo:
    """What a table was made from, of the JSON value in its metadata."""
    if not isinstance(stored, dict):
        raise ValueError("its metadata is no JSON object")
    known = {f.name: stored[f.name] for f in fields(TableInfo) if f.name in stored}
    names = {name: tuple(known.get(name, ())) for name in ("class_names", "effect_words")}
    words = known.get("words", {})
    texts = [known["weights_sha256"], *names["class_names"], *names["effect_words"]]
    texts += [text for label, others in words.items() for text in (label, *others)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its metadata has names that are no texts")
    return TableInfo(**known | names)


def _read_tensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no {path}. {REMEDY}") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). {REMEDY}") from error
    if lacking := [name for name in names if name not in tensors]:
        raise ArtifactError(f"{path} lacks {lacking[0]!r}. {REMEDY}")
    return {name: tensors[name] for name in names}
