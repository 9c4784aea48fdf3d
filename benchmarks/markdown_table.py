"""Rows of ratios as a Markdown table."""


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| measure | ratio (range) | should be at most | values |", "| --- | --- | --- | --- |"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        values = " / ".join(f"{value:.2f}" if row["unit"] == "s" else f"{value:.0f}" for value in row["values"])
        spread = f"{row['ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
        lines.append(f"| {row['measure']} | {spread} | {target} | {values} {row['unit']} |")
    return "\n".join(lines)
