"""Planning: what an architecture costs and how fast it can be on given hardware, by arithmetic. Nothing here needs torch."""
