"""Weights converted part by part, in processes of their own, into files that an interrupted run can take up again."""
