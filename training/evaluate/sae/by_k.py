"""Collections of SAEs with different k, compared in one table."""

from collections.abc import Sequence

from training.common.report import Cell, Table


def by_k(tables: Sequence[Table]) -> Table | None:
    """Table 1 of Tinaz et al. 2025: a row per branch and block, a column per step, from the tables of all collections.

    None if their reconstruction was not measured.
    """
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for table in tables:
        for row in table.rows if table.name == "reconstruction" else ():
            k = int(str(row["k of d_in"]).split()[0])
            time = f"SAE for t = {row['SAE for t']}, step {row['step']}"
            estimate, pca = str(row["explained variance"]), row["PCA"]
            of_row = cells.setdefault((str(row["branch"]), str(row["hookpoint"])), {})
            of_row[time, k] = f"{estimate}; PCA {pca}; k {k}"
    if not cells:
        return None
    times = list(dict.fromkeys(time for of_row in cells.values() for time, _ in of_row))
    rows: list[dict[str, Cell]] = []
    for (branch, hookpoint), of_row in sorted(cells.items()):
        ks = sorted({k for _, k in of_row})
        figures = {time: "<br>".join(of_row[time, k] for k in ks if (time, k) in of_row) or None for time in times}
        rows.append({"branch": branch, "hookpoint": hookpoint, **figures})
    notes = (
        "Explained variance on held-out images with 95 % intervals, and that of PCA with k components; a line per k.",
    )
    return Table("by_k", "Explained variance by block, branch, step and k", rows, notes)
