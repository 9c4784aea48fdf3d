"""Changes the basis inside attention heads, so that dimensions can be left out."""
