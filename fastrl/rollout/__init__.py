"""Rollout generation: engines, draft trees, acceptance, sampling, adaptation; no Lightning."""
