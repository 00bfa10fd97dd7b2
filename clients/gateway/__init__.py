"""The gateway: OpenAI's HTTP API in front of one or several Tritons that speak the text contract."""
