"""Tests of the rig: a test that rests on it is worth as much as it is."""
