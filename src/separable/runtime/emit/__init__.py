"""The kernel generators: one file per kernel family."""
