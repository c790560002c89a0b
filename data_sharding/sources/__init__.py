"""Where scans come from: one module a kind of data set, each with `find(config, space) -> Found`."""
