"""A concept table's files: what `python -m training labels` writes beside an SAE, and `core.concepts.table` reads.

In the SAE's folder: `concepts.parquet`, a row a latent; `counts.safetensors`, how often latents and classes meet; and
`examples.safetensors`, the pictures that show a latent best. At the collection's root `gallery/`, the pictures that
the examples of all its SAEs share.
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
"""Column of a table, in some: what words do to a latent."""
REMEDY = "Make it with `python -m training labels`."

Kind = Literal["object", "background", "style", "context-free", "unlabelled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a concept can be: a thing or a background where it fires, a look of the whole picture, a position, or none."""

_INFO = b"concepts"
"""Key in the schema's metadata of the Parquet file."""


class Candidate(NamedTuple):
    """A class, and how well a latent's activation above a threshold of its own matches the class's masks."""

    label: str
    """Name of the class."""
    iou: float
    """Intersection over union on the pictures on which the threshold was chosen."""
    held_out_iou: float
    """The same on the other pictures."""


class Scores(NamedTuple):
    """What was measured of a latent. Of one that never fires everything is 0 or empty."""

    best_class: str
    """The class of the highest IoU, whether or not it became the label."""
    iou: float
    """Of the best class, on the pictures on which it was chosen."""
    held_out_iou: float
    """Of the best class, on the other pictures."""
    precision: float
    """Share of the cells where the latent is above its threshold that are of the best class; held out."""
    recall: float
    """Share of the best class's cells where the latent is above its threshold; held out."""
    chance_iou: float
    """Mean held-out IoU where each picture has another one's masks, class and threshold chosen anew."""
    p_value: float
    """How often as much more than chance comes about where pictures have others' masks."""
    threshold: float
    """The best class's: a value from here on counts as active; 0: every value that is active at all."""
    firing_rate: float
    """Share of all cells where the latent is active."""
    mean: float
    """Of the values where it is active."""
    p99: float
    """99th percentile of the values where it is active."""
    spread: float
    """Root mean square distance of its activation from its centre in a picture, in sides of the picture; an even one
    has 0.41."""
    typical_t: float
    """Mean normalised time, weighted by activation; 1.0 the first step, 0.0 the last."""
    position_share: float
    """Share of its variance at a step that position alone explains."""
    style: str
    """The style word that its mean over a picture goes with best."""
    style_auroc: float
    """Probability, held out, that a picture of that style has a higher mean than one of another."""
    runner_ups: tuple[Candidate, ...]
    """The next best classes."""


class LabelledLatent(NamedTuple):
    """A latent and what it is called."""

    label: str
    """Empty where nothing stands."""
    kind: Kind
    """What sort of concept it is."""
    scores: Scores
    """What was measured."""


class Counts(NamedTuple):
    """How often latents are active where a class is, over the cells on which labels were chosen; float32."""

    intersections: Tensor
    """[d_sae, K] cells where the latent is active at all and the class is there."""
    active: Tensor
    """[d_sae] cells where the latent is active at all."""
    cells: Tensor
    """[K] cells of each class."""
    n_cells: Tensor
    """[] cells in all."""


class Examples(NamedTuple):
    """Pictures of the shared gallery that show each latent best, strongest first."""

    images: Tensor
    """[d_sae, 8] int16 which; -1 where there are no more."""
    maps: Tensor
    """[d_sae, 8, h, w] uint8 largest value over the steps, in 255ths of the picture's peak."""
    peaks: Tensor
    """[d_sae, 8] float32 largest value in the picture."""


@dataclass(frozen=True)
class TableInfo:
    """What a table was made from; kept in its file's metadata."""

    weights_sha256: str
    """Of the SAE's weights."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By label, other words for it."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """JSON: the settings it was made with."""
    effect_words: tuple[str, ...] = ()
    """Words whose effect on each latent is in the table, in the column's order."""


def save_table(folder: Path, rows: Sequence[LabelledLatent], info: TableInfo, effects: Tensor | None = None) -> None:
    """Write the table of an SAE, a row a latent, in one go.

    effects: [effect words, d_sae] what each word does to a latent at one moment of a picture: the change of its mean
        value over all positions, to a scale of the SAE's own (`training.labels.effects`).
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
    """The pandas frame of a table, and what it was made from.

    Raises:
        ArtifactError: It is missing, damaged, or no concept table.
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
        raise ArtifactError(f"{path} is no concept table, or one of another version: it has no {what}. {REMEDY}")
    told = json.loads(metadata[_INFO])
    told = {f.name: told[f.name] for f in fields(TableInfo) if f.name in told}
    info = TableInfo(**told | {name: tuple(told.get(name, ())) for name in ("class_names", "effect_words")})
    return table.to_pandas(), info


def save_tensors(path: Path, tensors: Counts | Examples) -> None:
    """Write counts or examples in one go."""
    with write_atomically(path) as part:
        save_file({name: value.contiguous() for name, value in tensors._asdict().items()}, part)


def read_counts(path: Path) -> Counts:
    """The counts of a file `counts.safetensors`."""
    return Counts(**_read_tensors(path, Counts._fields))


def read_examples(path: Path) -> Examples:
    """The examples of a file `examples.safetensors`."""
    return Examples(**_read_tensors(path, Examples._fields))


def weights_sha256(folder: Path) -> str:
    """Hash of the weights of the SAE in a folder."""
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
