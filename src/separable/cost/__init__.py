"""The account: parameters, multiply-adds, memory, traffic and latency of a network."""
