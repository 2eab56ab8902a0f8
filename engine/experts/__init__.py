"""Sparse experts beside a merged model: their files, and turning backbone and expert into a plain checkpoint."""
