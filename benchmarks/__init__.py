"""Benchmarks: each verifies equal answers first, interleaves the rivals in one process, and writes what it measured."""
