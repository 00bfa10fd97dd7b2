"""What is copied into a model repository. Nothing here is imported by moeship."""
