"""One file per metric: Task -> Table; METRICS in mpq_fx.passes names them."""
