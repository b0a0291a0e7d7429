"""What adapters learned and what packing lost, layer by layer: `qtune inspect`."""
