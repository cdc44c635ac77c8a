"""Neighbours: one file per system that SpotGuard talks to."""
