"""Adapters to other libraries, each imported by its own name only. Layer: above everything else."""
