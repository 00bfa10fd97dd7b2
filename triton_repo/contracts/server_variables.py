"""Variables of a server's environment by which `moeship serve` tells the models something. In a tritonserver that
moeship did not start they are absent."""

RESTARTS_VARIABLE = "MOESHIP_RESTARTS"  # how often `serve` has started the server again
REQUEST_LOG_VARIABLE = "MOESHIP_REQUEST_LOG"  # number of the open file that gets a line for each request
