"""One spelling per idea, so that every later stage matches one op instead of ten."""
