"""Experts in a running model: attached to an nn.Module, put in place of its weights, or routed to rows of a batch."""
