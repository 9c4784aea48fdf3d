"""Model card, page about a run, plots and Hub uploads."""
