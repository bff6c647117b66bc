"""Everything that speaks HTTP: the server and its codec, and the client."""
