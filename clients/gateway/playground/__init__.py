"""The playground: one page at the gateway's `/`, for people who want to see what a model does."""
