"""The load generator: sends requests to a server as many clients would, and measures what each of them sees."""
