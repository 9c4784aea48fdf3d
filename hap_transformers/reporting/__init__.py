"""Cards, pages, plots and uploads."""
