"""A finished run behind HTTP and MCP: `simlm serve`. Needs nothing of the stages that made it."""
