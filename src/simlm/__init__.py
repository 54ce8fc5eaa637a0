"""simlm: the best single-vector retriever for your own corpus. See README.md."""
