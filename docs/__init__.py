"""The documentation's pages, and the code that writes their tables and pictures."""
