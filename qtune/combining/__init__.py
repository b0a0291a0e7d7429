"""Several trained adapters of one base become one: `qtune combine`."""
