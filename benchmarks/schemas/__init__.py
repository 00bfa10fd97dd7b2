"""JSON schemas for measurements of guided decoding and its tests."""
