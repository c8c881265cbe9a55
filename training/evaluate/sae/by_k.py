"""Autoencoders of several k beside each other: apart from their evaluation, whose stored results thus stay good."""

from collections.abc import Sequence

from training.common.report import Cell, Table


def by_k(tables: Sequence[Table]) -> Table:
    """The paper's Table 1: a row a branch and block, a column a time and k, from `reconstruction` of each collection.

    PCA has as many components as a code of that k has entries.
    """
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for table in tables:
        for row in table.rows:
            k = int(str(row["k of d_in"]).split()[0])
            time = f"SAE for t = {row['SAE for t']}, step {row['step']}"
            estimate, pca = str(row["explained variance"]), row["of PCA"]
            of_row = cells.setdefault((str(row["branch"]), str(row["hookpoint"])), {})
            of_row[time, k] = f"{estimate}; PCA {pca}; k {k}"
    times = list(dict.fromkeys(time for of_row in cells.values() for time, _ in of_row))
    rows: list[dict[str, Cell]] = []
    for (branch, hookpoint), of_row in sorted(cells.items()):
        ks = sorted({k for _, k in of_row})
        figures = {time: "<br>".join(of_row[time, k] for k in ks if (time, k) in of_row) or None for time in times}
        rows.append({"branch": branch, "hookpoint": hookpoint, **figures})
    notes = (
        "Explained variance on held-out pictures with 95 % intervals, that of PCA with k components beside it, a line "
        "a k. Of the settings and the pictures the tables above tell more.",
    )
    return Table("by_k", "Explained variance by block, branch, step and k", rows, notes)
