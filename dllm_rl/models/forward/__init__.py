"""How a forward runs: packing by length, compiled blocks, the fp32 head, recomputation, rotary tables, routing."""
