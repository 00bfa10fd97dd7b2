"""Evaluates an engine by lm-evaluation-harness in process: `moeship eval`."""
