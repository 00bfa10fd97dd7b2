"""The slots of a cache: who has which, what the free ones still hold, and which prompts begin like that."""
