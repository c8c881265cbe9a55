"""Downloads of a decomposition: CSV, JSON with all settings and maps, and the Python lines that repeat it."""

import json
from typing import Any

from core.information.decomposition import Decomposition, PairInformation, Part, Total
from core.ui.look.export import csv_of, image_lines, image_settings, rounded
from core.ui.look.scene import Scene


def pair_rows(d: Decomposition) -> list[dict[str, Any]]:
    """All totals of a pair, one row each; `bits_95` is the half-width of a 95% interval."""
    pair, factor = d.pairs[0], d.interval_factor()
    return [
        {
            "part": name,
            "estimate": estimate,
            "bits": round(total.bits, 4),
            "bits_95": round(total.stderr * factor, 4),
        }
        for name, estimate, total in _totals(pair)
    ]


def _totals(pair: PairInformation) -> list[tuple[str, str, Part | Total]]:
    first, second = pair.words
    unique = [f"unique: {first}", f"unique: {second}"]
    names = ["redundancy", *unique, "synergy"]
    rows: list[tuple[str, str, Part | Total]] = [
        (name, "orthogonal", part) for name, part in zip(names, pair.parts, strict=True)
    ]
    rows += [(f"alone: {word}", "orthogonal", part) for word, part in zip(pair.words, pair.alone, strict=True)]
    rows += [("together", "orthogonal", pair.together), ("redundancy minus synergy", "direct", pair.coinformation)]
    if (other := pair.by_surprisal) is not None:
        parts = (other.redundancy, *other.unique, other.synergy)
        rows += [(f"{name}, by surprisal", "direct", part) for name, part in zip(names, parts, strict=True)]
    return rows


def pair_csv(d: Decomposition) -> str:
    """The totals as CSV."""
    return csv_of(pair_rows(d))


def pair_json(scene: Scene, d: Decomposition, model_name: str) -> str:
    """All settings and all numbers, maps included, in bits."""
    return json.dumps({"image": image_settings(scene, model_name), **rounded(d.to_dict())}, ensure_ascii=False)


def pair_python(scene: Scene, d: Decomposition, model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    prompt, *words = (json.dumps(text, ensure_ascii=False) for text in (scene.prompt, *d.words))
    return (
        f"{image_lines(scene, model_name)}"
        f"d = core.decompose(\n    model, image, {prompt}, {', '.join(words)},\n"
        f'    given="{d.given}", rel_error={d.settings["rel_error"]:g}, seed={d.seed}\n)\n'
        "for part in (d.redundancy, *d.unique, d.synergy):\n"
        '    print(f"{part.bits:6.2f} bits, standard error {part.stderr:.2f}")\n'
    )
