"""What a model costs: multiply-accumulates, latency, and the latency of each layer as a function of its width."""
