"""Tools of a chat: which of them a request offers, the form in which its model writes calls, and calls read from it."""
