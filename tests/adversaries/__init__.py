"""Operators that try to make an interval miss the truth, or a row call itself converged without being so.

``python tests/adversaries --seconds 600 --seed 1`` searches for them: at random, and uphill from what came closest.
``tests/test_adversaries.py`` runs a fixed share of it. Every truth is independent of the package: closed forms with
exact numbers, mpmath, or numpy's SVD with its own rounding counted.
"""
