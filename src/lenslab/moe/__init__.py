"""Mixtures of experts: which expert reads which token, and what that means."""
