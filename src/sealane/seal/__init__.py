"""Sealed records: what crosses a lane."""
