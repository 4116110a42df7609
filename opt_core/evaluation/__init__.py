"""Evaluation without a framework: models come in as functions from ids to scores."""
