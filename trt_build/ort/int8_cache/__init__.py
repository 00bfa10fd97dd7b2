"""Keys and values in int8: their scales, how a build finds them, and what they cost."""
