"""A made-up corpus with labelled queries, small enough for whole pipelines in tests, in each form that the readers take."""
