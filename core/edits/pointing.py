"""Concepts by pointing at an image."""

from collections.abc import Collection

from core.concepts.trace import CodeTrace, SaeSite
from core.edits.base import Target


def concepts_at(
    trace: CodeTrace, x: float, y: float, site: SaeSite, *, steps: Collection[int] | None = None, limit: int = 3
) -> tuple[Target, ...]:
    """The concepts that were most active at a point of an image, strongest first.

    Args:
        trace: The codes of the image's run.
        x: From 0, the left edge, to 1, the right edge.
        y: From 0, the top, to 1, the bottom.
        site: Hookpoint and branch to look at.
        steps: Sampler steps over which values are summed; all by default.
        limit: The most concepts to return.

    Raises:
        ValueError: A point outside the image, or a site or steps that the trace does not have.
    """
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"A point lies between 0 and 1 in x and y, not at ({x}, {y}).")
    codes = [
        code
        for key, code in trace.codes.items()
        if (key.hookpoint, key.branch) == site and (steps is None or key.step in steps)
    ]
    if not codes:
        raise ValueError(f"Nothing was recorded at {site.hookpoint} ({site.branch}) at these steps.")
    height, width = trace.grids[site.hookpoint]
    cell = min(int(y * height), height - 1) * width + min(int(x * width), width - 1)
    totals: dict[int, float] = {}
    for code in codes:
        for number, value in zip(code.indices[cell].tolist(), code.values[cell].tolist(), strict=True):
            if value > 0:
                totals[number] = totals.get(number, 0.0) + value
    best = sorted(totals, key=lambda number: (-totals[number], number))[:limit]
    return tuple(Target(site, number) for number in best)
